// QuantMatMul. Example: P V of DiT-XL/2, 2 x 16 heads, M 256, K 256, N 72, RTX 4090.
//   operations 2 * 151 M = 0.3 G / 661 T/s (int8 tensor cores)  = 0.5 us
//   bytes a 2.1 + b 0.6 + y 2.4 = 5.1 MB / 1.0 TB/s             = 5 us   <- the bound
// This version is simple and right: a warp a column, its lanes along K, each value of b read once for kRows rows,
// sums in int32.
#include "elements.h"
#include "gpu.h"

namespace {

constexpr int kWarp = 32;
constexpr int kWarpsABlock = 4;
constexpr int kRows = 8;

}  // namespace

GPU_KERNEL(quant_matmul, const int8_t* a, const float* sa, const int8_t* b, const float* sb, void* y,
           int64_t heads, int64_t m, int64_t n, int64_t k, int64_t dtype) {
    const int64_t lane = gpu::thread() % kWarp;
    const int64_t column = gpu::block_x() * kWarpsABlock + gpu::thread() / kWarp;
    if (column >= n) return;  // a whole warp
    const int64_t blocks = (m + kRows - 1) / kRows;
    for (int64_t block = gpu::block_y(); block < heads * blocks; block += gpu::blocks_y()) {
        const int64_t head = block / blocks, first = block % blocks * kRows;
        const int64_t count = m - first < kRows ? m - first : kRows;
        const int8_t *rows = a + (head * m + first) * k, *other = b + (head * n + column) * k;
        int sums[kRows] = {};
        for (int64_t i = lane; i < k; i += kWarp) {
            const int value = other[i];
            for (int row = 0; row < count; ++row) sums[row] += value * rows[row * k + i];
        }
        int mine =
            0;  // lane i finishes row i; an index that is not constant would move the array to local memory
        for (int row = 0; row < kRows; ++row) {
            int sum = sums[row];
            for (int mask = kWarp / 2; mask; mask /= 2) sum += gpu::shuffle_xor(sum, mask);
            mine = row == lane ? sum : mine;
        }
        if (lane >= count) continue;
        const int64_t row = head * m + first + lane;
        store_element(y, row * n + column, dtype, (float)mine * sa[row] * sb[head * n + column]);
    }
}
