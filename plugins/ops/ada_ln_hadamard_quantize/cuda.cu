// AdaLnHadamardQuantize. Example: DiT-XL/2, 512 tokens of 1152, RTX 4090 (1.0 TB/s, 82.6
// Tflop/s fp32; 0.65 T/s in float64, without contraction).
//   bytes 512 * 1152 * (4 + 1) + scales = 2.95 MB / 1.0 TB/s           = 2.9 us   (with y 5.3 us)
//   operations 512 * 1152 * 5 in float64, its conversions among them / 0.65 T/s = 4.5 us   <- the bound (8 an element with
//                                                                                 the gaussian clip: 7.3 us)
// So: bound by float64 on cards with few units for it, by memory on Hopper, whose rate is half of that of float32. Two
// kernels, as HadamardQuantize's: in the registers of warps a row is read once; through shared memory three times, of which
// the second and the third come from a cache. Compiled without contraction to fused multiply-adds.
#include "cuda_rows.h"
#include "cuda_warp_rows.h"

namespace {

// A value of the row after LayerNorm and modulation.
struct Modulated {
    Row x, shift, scale;
    float mean, inverse;

    GPU_DEVICE float operator()(int64_t i) const {
        return (x(i) - mean) * inverse * (1.0f + scale(i)) + shift(i);
    }
};

// v (1 + scale) + shift of a row's normalized values; element `sample` of both begins the lane's.
GPU_DEVICE void modulate(const WarpRow& w, const void* shift, const void* scale, int64_t sample,
                         int64_t dtype, float inverse, Values& v) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        if (!w.has(j)) continue;
        const int64_t at = sample + 4 * kLanes * j;
        const gpu::Float4 by = load_four(scale, at, dtype), to = load_four(shift, at, dtype);
        v.at[j][0] = v.at[j][0] * inverse * (1.0f + by.x) + to.x;
        v.at[j][1] = v.at[j][1] * inverse * (1.0f + by.y) + to.y;
        v.at[j][2] = v.at[j][2] * inverse * (1.0f + by.z) + to.z;
        v.at[j][3] = v.at[j][3] * inverse * (1.0f + by.w) + to.w;
    }
}

}  // namespace

GPU_KERNEL(ada_ln_hadamard_quantize, const void* x, const float* qmax, int8_t* q, float* s, int64_t k,
           int64_t block, int64_t tile, int64_t rows_a_qmax, int64_t gaussian, int64_t mid_rise,
           int64_t packed, int64_t dtype, const void* shift, const void* scale, const float* eps, void* y,
           int64_t rows_a_sample) {
    GPU_SHARED(double, sums, kThreads);
    GPU_SHARED(float, peaks, kThreads);
    const gpu::Shared<float> t = gpu::dynamic_shared<float>(tile);
    const int64_t row = gpu::block_x(), sample = row / rows_a_sample * k;
    const Row own{x, row * k, dtype};

    double sum = 0;
    for (int64_t i = gpu::thread(); i < k; i += kThreads) sum += own(i);
    const float mean = (float)(sum_of_block(sums, sum) / (double)k);
    double squares = 0;
    for (int64_t i = gpu::thread(); i < k; i += kThreads) {
        const float deviation = own(i) - mean;
        squares += (double)deviation * deviation;
    }
    const float inverse = (float)(1.0 / sqrt(sum_of_block(sums, squares) / (double)k + eps[0]));
    const Modulated modulated{own, {shift, sample, dtype}, {scale, sample, dtype}, mean, inverse};
    if (y)
        for (int64_t i = gpu::thread(); i < k; i += kThreads)
            store_element(y, row * k + i, dtype, modulated(i));
    quantize_row(modulated, sums, peaks, t,
                 {k, block, tile, qmax[row / rows_a_qmax], gaussian != 0, mid_rise != 0, packed != 0},
                 q + row * (packed ? k / 2 : k), s + row);
}

GPU_KERNEL_OF(4 * kLanes, 3, ada_ln_hadamard_quantize_warps, const void* x, const float* qmax, int8_t* q,
              float* s, int64_t k, int64_t block, int64_t m, int64_t rows_a_qmax, int64_t gaussian,
              int64_t mid_rise, int64_t packed, int64_t dtype, const void* shift, const void* scale,
              const float* eps, void* y, int64_t rows_a_sample) {
    GPU_SHARED(double, sums, kMostWarps);
    GPU_SHARED(int, peaks, kMostWarps);
    const WarpRow w = warp_row(m, k);
    Values v;
    load_row(w, x, dtype, v);
    double sum = 0;
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += v.at[j][i];  // 0 beyond the row
    const float mean = (float)(sum_of_row(w, sums, sum) / (double)k);
    double squares = 0;
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v.at[j][i] = w.has(j) ? v.at[j][i] - mean : 0.0f;
            squares += (double)v.at[j][i] * v.at[j][i];
        }
    const float inverse = (float)(1.0 / sqrt(sum_of_row(w, sums, squares) / (double)k + gpu::load(eps)));
    const int64_t sample = w.run_of(rows_a_sample) * k + w.in_row;
    if (dtype == kFloat32)
        modulate(w, shift, scale, sample, kFloat32, inverse, v);
    else
        modulate(w, shift, scale, sample, dtype, inverse, v);
    if (y) store_row(w, v, y, dtype);
    quantize_values(
        w, {block, gpu::load(qmax + w.run_of(rows_a_qmax)), gaussian != 0, mid_rise != 0, packed != 0}, sums,
        peaks, v, q, s);
}
