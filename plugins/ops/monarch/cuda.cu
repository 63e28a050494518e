// MonarchAdd. Example: DiT-XL/2 fc1, 512 tokens, K 1152, N 4608, a 4 x 4 grid of rank 4, RTX 4090 (1.0 TB/s, 82.6
// Tflop/s fp32).
//   bytes 512 * 4 * (1152 + 2 * 4608) + 92160 * 4 = 21.6 MB / 1.0 TB/s = 22 us   <- the bound
//   operations 2 * 512 * 92160                             / 82.6 T/s  = 1.1 us
// So: memory-bound. This version is simple and right: a thread block takes a few tokens from x to y with z in shared
// memory; a warp sums up a value of z, and a thread an output.
#include "gpu.h"

namespace {

constexpr int kThreads = 256, kWarp = 32, kTokens = 4;

}  // namespace

GPU_KERNEL(monarch_add, const float* plain, const float* x, const float* down, const float* up, float* y,
           int64_t m, int64_t n, int64_t k, int64_t blocks_in, int64_t blocks_out, int64_t rank) {
    const int64_t inner = blocks_in * rank, values = blocks_out * inner, rows = rank * blocks_out;
    const int64_t width = k / blocks_in, height = n / blocks_out;
    const gpu::Shared<float> z = gpu::dynamic_shared<float>(kTokens * values);
    const int64_t first = gpu::block_x() * kTokens, lane = gpu::thread() % kWarp;
    const int64_t count = m - first < kTokens ? m - first : kTokens;

    for (int64_t row = gpu::thread() / kWarp; row < values; row += kThreads / kWarp) {
        const int64_t a = row / rows, own = row % rows;  // the row of `down` over all input blocks
        float sums[kTokens] = {};
        for (int64_t i = lane; i < width; i += kWarp) {
            const float factor = down[row * width + i];
            for (int token = 0; token < count; ++token)
                sums[token] += factor * x[(first + token) * k + a * width + i];
        }
        for (int token = 0; token < kTokens; ++token) {
            float sum = sums[token];
            for (int mask = kWarp / 2; mask; mask /= 2) sum += gpu::shuffle_xor(sum, mask);
            if (lane == 0)
                z.store(token * values + own % blocks_out * inner + a * rank + own / blocks_out, sum);
        }
    }
    gpu::sync_block();

    for (int64_t o = gpu::thread(); o < n; o += kThreads) {
        const int64_t b = o % blocks_out, s = o / blocks_out;
        float sums[kTokens] = {};
        for (int64_t j = 0; j < inner; ++j) {
            const float factor = up[(b * height + s) * inner + j];
            for (int token = 0; token < kTokens; ++token)
                sums[token] += factor * z.load(token * values + b * inner + j);
        }
        for (int token = 0; token < count; ++token)
            y[(first + token) * n + o] = plain[(first + token) * n + o] + sums[token];
    }
}
