// AdaLnHadamardQuantize, one block a token. Example: DiT-XL/2, 512 tokens of 1152, RTX 4090 (1.0 TB/s, 82.6
// Tflop/s fp32, 1.3 Tflop/s fp64).
//   bytes 512 * 1152 * (4 + 1) + scales = 2.95 MB / 1.0 TB/s           = 2.9 us   <- the bound (with y 5.3 us)
//   operations 512 * 1152 * 5 in float64                  / 1.3 T/s    = 2.3 us
// So: memory-bound, but not by much. This version is simple and right: a row is read three times, of which the
// second and the third come from a cache. Compiled without contraction to fused multiply-adds.
#include "cuda_rows.h"

namespace {

// A value of the row after LayerNorm and modulation.
struct Modulated {
    const float *x, *shift, *scale;
    float mean, inverse;

    GPU_DEVICE float operator()(int64_t i) const {
        return (x[i] - mean) * inverse * (1.0f + scale[i]) + shift[i];
    }
};

}  // namespace

GPU_KERNEL(ada_ln_hadamard_quantize, const float* x, const float* qmax, int8_t* q, float* s, int64_t k,
           int64_t block, int64_t tile, int64_t rows_a_qmax, int64_t gaussian, int64_t mid_rise,
           const float* shift, const float* scale, const float* eps, float* y, int64_t rows_a_sample) {
    GPU_SHARED(double, sums, kThreads);
    GPU_SHARED(float, peaks, kThreads);
    const gpu::Shared<float> t = gpu::dynamic_shared<float>(tile);
    const int64_t row = gpu::block_x(), sample = row / rows_a_sample * k;
    const float* own = x + row * k;

    double sum = 0;
    for (int64_t i = gpu::thread(); i < k; i += kThreads) sum += own[i];
    const float mean = (float)(sum_of_block(sums, sum) / (double)k);
    double squares = 0;
    for (int64_t i = gpu::thread(); i < k; i += kThreads) {
        const float deviation = own[i] - mean;
        squares += (double)deviation * deviation;
    }
    const float inverse = (float)(1.0 / sqrt(sum_of_block(sums, squares) / (double)k + eps[0]));
    const Modulated modulated{own, shift + sample, scale + sample, mean, inverse};
    if (y)
        for (int64_t i = gpu::thread(); i < k; i += kThreads) y[row * k + i] = modulated(i);
    quantize_row(modulated, sums, peaks, t,
                 {k, block, tile, qmax[row / rows_a_qmax], gaussian != 0, mid_rise != 0}, q + row * k,
                 s + row);
}
