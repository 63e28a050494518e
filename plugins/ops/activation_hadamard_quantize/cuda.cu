// ActivationHadamardQuantize. Example: DiT-XL/2, 512 tokens of 4608, RTX 4090 (1.0 TB/s, 82.6
// Tflop/s fp32, 0.65 T/s in float64 without contraction).
//   bytes 512 * 4608 * (4 + 1) + scales = 11.8 MB / 1.0 TB/s           = 11.8 us   <- the bound (with y 21 us)
//   operations 512 * 4608 * (27 of GELU + 9 stages + 3) / 82.6 T/s     = 1.1 us
//   with the gaussian clip 512 * 4608 * 3 in float64 / 0.65 T/s = 10.9 us
// So: memory-bound, with that clip only just on cards with few float64 units. Two kernels, as HadamardQuantize's: in the
// registers of warps, each value is activated once; through shared memory a row of more than one tile is activated twice, as
// it is read twice. Compiled without contraction to fused multiply-adds.
#include "activation.h"
#include "cuda_rows.h"
#include "cuda_warp_rows.h"

namespace {

struct Activated {
    Row x;

    GPU_DEVICE float operator()(int64_t i) const { return d2d::gelu<float, uint32_t>(x(i)); }
};

}  // namespace

GPU_KERNEL(activation_hadamard_quantize, const void* x, const float* qmax, int8_t* q, float* s, int64_t k,
           int64_t block, int64_t tile, int64_t rows_a_qmax, int64_t gaussian, int64_t mid_rise,
           int64_t dtype, void* y) {
    GPU_SHARED(double, sums, kThreads);
    GPU_SHARED(float, peaks, kThreads);
    const gpu::Shared<float> t = gpu::dynamic_shared<float>(tile);
    const int64_t row = gpu::block_x();
    const Activated activated{{x, row * k, dtype}};
    if (y)
        for (int64_t i = gpu::thread(); i < k; i += kThreads)
            store_element(y, row * k + i, dtype, activated(i));
    quantize_row(activated, sums, peaks, t,
                 {k, block, tile, qmax[row / rows_a_qmax], gaussian != 0, mid_rise != 0}, q + row * k,
                 s + row);
}

GPU_KERNEL_OF(kMostWarps* kLanes, 1, activation_hadamard_quantize_warps, const void* x, const float* qmax,
              int8_t* q, float* s, int64_t k, int64_t block, int64_t m, int64_t rows_a_qmax, int64_t gaussian,
              int64_t mid_rise, int64_t dtype, void* y) {
    GPU_SHARED(double, sums, kMostWarps);
    GPU_SHARED(int, peaks, kMostWarps);
    const WarpRow w = warp_row(m, k);
    Values v;
    load_row(w, x, dtype, v);
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
        if (w.any_has(j))
#pragma unroll
            for (int i = 0; i < 4; ++i) v.at[j][i] = d2d::gelu<float, uint32_t>(v.at[j][i]);
    if (y) store_row(w, v, y, dtype);
    quantize_values(w, {block, gpu::load(qmax + w.run_of(rows_a_qmax)), gaussian != 0, mid_rise != 0}, sums,
                    peaks, v, q, s);
}
