// <Format>Gemm and <Format>GemmLowRank on interchange words. Example: DiT-XL/2 fc1, M 512, K 1152, N 4608,
// RTX 4090.
//   operations 2 M N K = 5.44 G / 661 T/s (int8 tensor cores) = 8.2 us  <- the bound
//   bytes w 1.06 + q 0.59 + y 9.44 = 11.1 MB / 1.0 TB/s        = 11 us with float32 outputs
// So: on both bounds. This version is simple and right, and far from them: a warp an output, its lanes along
// K, every code decoded once for kTokens tokens, sums in int32. Tensor cores, a kernel layout and fused
// outputs come with the next one.
#include "formats.h"
#include "gpu.h"

namespace {

constexpr int kWarp = 32;
constexpr int kWarpsABlock = 4;
constexpr int kTokens = 8;

template <int Index>
GPU_DEVICE void gemm(const int8_t* q, const float* s, const int32_t* w, const float* ws, const float* bias,
                     const float* t, const float* up, float* y, int64_t m, int64_t n, int64_t k,
                     int64_t groups, int64_t rank) {
    constexpr d2d::FormatSpec format = d2d::kFormats[Index];
    const int64_t lane = gpu::thread() % kWarp,
                  output = gpu::block_x() * kWarpsABlock + gpu::thread() / kWarp;
    if (output >= n) return;  // a whole warp
    const int32_t* row = w + output * format.words(k);
    const int64_t size = k / groups;
    for (int64_t first = gpu::block_y() * kTokens; first < m; first += gpu::blocks_y() * kTokens) {
        const int64_t count = m - first < kTokens ? m - first : kTokens;
        float total[kTokens] = {};
        for (int64_t group = 0; group < groups; ++group) {
            int sums[kTokens] = {};
            for (int64_t i = group * size + lane; i < (group + 1) * size; i += kWarp) {
                const int weight = d2d::interchange_code(format, row, i) - format.offset;
                for (int token = 0; token < count; ++token)
                    sums[token] += weight * q[(first + token) * k + i];
            }
            for (int token = 0; token < count; ++token) {
                for (int mask = kWarp / 2; mask; mask /= 2)
                    sums[token] += gpu::shuffle_xor(sums[token], mask);
                total[token] += (float)sums[token] * ws[output * groups + group];
            }
        }
        if (lane >= count) continue;
        float mine =
            0;  // lane i finishes token i; an index that is not constant would move the array to local memory
        for (int token = 0; token < kTokens; ++token) mine = token == lane ? total[token] : mine;
        float value = mine * s[first + lane] + bias[output];
        for (int64_t r = 0; r < rank; ++r) value += t[(first + lane) * rank + r] * up[output * rank + r];
        y[(first + lane) * n + output] = value;
    }
}

}  // namespace

#define QUANT_GEMM(name, index)                                                                             \
    GPU_KERNEL(name, const int8_t* q, const float* s, const int32_t* w, const float* ws, const float* bias, \
               const float* t, const float* up, float* y, int64_t m, int64_t n, int64_t k, int64_t groups,  \
               int64_t rank) {                                                                              \
        gemm<index>(q, s, w, ws, bias, t, up, y, m, n, k, groups, rank);                                    \
    }

QUANT_GEMM(ternary_gemm, 0)
QUANT_GEMM(int3_gemm, 1)
QUANT_GEMM(int4_gemm, 2)
QUANT_GEMM(int8_gemm, 3)
