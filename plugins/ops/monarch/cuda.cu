// MonarchAdd. Example: DiT-XL/2 fc1, 512 tokens, K 1152, N 4608, a 4 x 4 grid of rank 4, RTX 4090 (1.0 TB/s, 82.6
// Tflop/s fp32).
//   bytes 512 * 4 * (1152 + 2 * 4608) + 92160 * 4 = 21.6 MB / 1.0 TB/s = 22 us   <- the bound
//   operations 2 * 512 * 92160                             / 82.6 T/s  = 1.1 us
// So: memory-bound. This version is simple and right: a thread block takes a few tokens from x to y with z in shared
// memory; a thread sums up a value of z of one token, and an output of all of them.
#include "elements.h"
#include "gpu.h"

namespace {

constexpr int kThreads = 256, kTokens = 4;

}  // namespace

GPU_KERNEL(monarch_add, const void* plain, const void* x, const float* down, const float* up, void* y,
           int64_t m, int64_t n, int64_t k, int64_t blocks_in, int64_t blocks_out, int64_t rank,
           int64_t dtype) {
    const int64_t columns = rank * blocks_out, values = blocks_in * columns, width = k / blocks_in;
    const gpu::Shared<float> z = gpu::dynamic_shared<float>(kTokens * values);
    const int64_t first = gpu::block_x() * kTokens, count = m - first < kTokens ? m - first : kTokens;

    for (int64_t i = gpu::thread(); i < kTokens * values; i += kThreads) {
        const int64_t token = i / values, value = i % values, start = value / columns * width;
        float sum = 0;
        if (token < count)
            for (int64_t j = start; j < start + width; ++j)
                sum += load_element(x, (first + token) * k + j, dtype) * down[j * columns + value % columns];
        z.store(i, sum);
    }
    gpu::sync_block();

    for (int64_t o = gpu::thread(); o < n; o += kThreads) {
        float sums[kTokens] = {};
        for (int64_t j = 0; j < blocks_in * rank; ++j) {
            const float factor = up[j * n + o];
            for (int token = 0; token < kTokens; ++token)
                sums[token] += factor * z.load(token * values + j * blocks_out + o % blocks_out);
        }
        for (int token = 0; token < kTokens; ++token)
            if (token < count) {
                const int64_t i = (first + token) * n + o;
                store_element(y, i, dtype, load_element(plain, i, dtype) + sums[token]);
            }
    }
}
