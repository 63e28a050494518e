// HadamardQuantize, one block a token. Example: DiT-XL/2, 512 tokens of 1152, RTX 4090 (1.0 TB/s, 82.6
// Tflop/s fp32).
//   bytes 512 * 1152 * (4 + 1) + scales = 2.95 MB / 1.0 TB/s  = 2.9 us   <- the bound
//   operations 512 * 1152 * (7 stages + 3)      / 82.6 T/s    = 0.07 us
// So: memory-bound. This version is simple and right (cuda_rows.h). Compiled without contraction to fused
// multiply-adds.
#include "cuda_rows.h"

namespace {

struct Plain {
    const float* x;

    GPU_DEVICE float operator()(int64_t i) const { return x[i]; }
};

}  // namespace

GPU_KERNEL(hadamard_quantize, const float* x, const float* qmax, int8_t* q, float* s, int64_t k,
           int64_t block, int64_t tile, int64_t rows_a_qmax, int64_t gaussian, int64_t mid_rise) {
    GPU_SHARED(double, sums, kThreads);
    GPU_SHARED(float, peaks, kThreads);
    const gpu::Shared<float> t = gpu::dynamic_shared<float>(tile);
    const int64_t row = gpu::block_x();
    quantize_row(Plain{x + row * k}, sums, peaks, t,
                 {k, block, tile, qmax[row / rows_a_qmax], gaussian != 0, mid_rise != 0}, q + row * k,
                 s + row);
}
