// ActivationHadamardQuantize, gated or not. RTX 4090 (1.0 TB/s, 82.6 Tflop/s fp32, 0.65 T/s in float64 without
// contraction). GELU of DiT-XL/2, 512 tokens of 4608:
//   bytes 512 * 4608 * (4 + 1) + scales = 11.8 MB / 1.0 TB/s           = 11.8 us   <- the bound (with y 21 us)
//   operations 512 * 4608 * (27 of GELU + 9 stages + 3) / 82.6 T/s     = 1.1 us
//   with the gaussian clip 512 * 4608 * 3 in float64 / 0.65 T/s = 10.9 us
// SiLU and a factor, Z-Image, 4096 tokens of 10240:
//   bytes 4096 * 10240 * (4 + 4 + 1) + scales = 377 MB / 1.0 TB/s      = 378 us    <- the bound (with y 545 us)
//   operations 4096 * 10240 * (24 of SiLU + 1 + 9 + 3) / 82.6 T/s      = 19 us
//   as Sigmoid, Mul, Mul and HadamardQuantize 37 bytes a value, 1.55 ms
// SiLU before a modulation has two rows: a launch less is all that it saves.
// So: memory-bound, with that clip only just on cards with few float64 units. Two kernels, as HadamardQuantize's: in the
// registers of warps, each value is activated once; through shared memory a row of more than one tile is activated twice, as
// it is read twice. Compiled without contraction to fused multiply-adds.
#include "activation.h"
#include "cuda_rows.h"
#include "cuda_warp_rows.h"

namespace {

GPU_DEVICE float activated(int64_t activation, float x) {
    return d2d::activated<float, uint32_t>((d2d::Activation)activation, x);
}

// A value of the row, times that of `factor` where the row is gated.
struct Activated {
    Row x, factor;
    int64_t activation;

    GPU_DEVICE float operator()(int64_t i) const {
        const float active = activated(activation, x(i));
        return factor.x ? active * factor(i) : active;
    }
};

GPU_DEVICE void multiply(const WarpRow& w, const void* factor, int64_t dtype, Values& v) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        if (!w.has(j)) continue;
        const gpu::Float4 by = load_four(factor, w.mine + 4 * kLanes * j, dtype);
        v.at[j][0] *= by.x;
        v.at[j][1] *= by.y;
        v.at[j][2] *= by.z;
        v.at[j][3] *= by.w;
    }
}

}  // namespace

GPU_KERNEL(activation_hadamard_quantize, const void* x, const float* qmax, int8_t* q, float* s, int64_t k,
           int64_t block, int64_t tile, int64_t rows_a_qmax, int64_t gaussian, int64_t mid_rise,
           int64_t packed, int64_t dtype, void* y, const void* factor, int64_t activation) {
    GPU_SHARED(double, sums, kThreads);
    GPU_SHARED(float, peaks, kThreads);
    const gpu::Shared<float> t = gpu::dynamic_shared<float>(tile);
    const int64_t row = gpu::block_x();
    const Activated active{{x, row * k, dtype}, {factor, row * k, dtype}, activation};
    if (y)
        for (int64_t i = gpu::thread(); i < k; i += kThreads) store_element(y, row * k + i, dtype, active(i));
    quantize_row(active, sums, peaks, t,
                 {k, block, tile, qmax[row / rows_a_qmax], gaussian != 0, mid_rise != 0, packed != 0},
                 q + row * (packed ? k / 2 : k), s + row);
}

GPU_KERNEL_OF(kMostWarps* kLanes, 1, activation_hadamard_quantize_warps, const void* x, const float* qmax,
              int8_t* q, float* s, int64_t k, int64_t block, int64_t m, int64_t rows_a_qmax, int64_t gaussian,
              int64_t mid_rise, int64_t packed, int64_t dtype, void* y, const void* factor,
              int64_t activation) {
    GPU_SHARED(double, sums, kMostWarps);
    GPU_SHARED(int, peaks, kMostWarps);
    const WarpRow w = warp_row(m, k);
    Values v;
    load_row(w, x, dtype, v);
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
        if (w.any_has(j))
#pragma unroll
            for (int i = 0; i < 4; ++i) v.at[j][i] = activated(activation, v.at[j][i]);
    if (factor) dtype == kFloat32 ? multiply(w, factor, kFloat32, v) : multiply(w, factor, dtype, v);
    if (y) store_row(w, v, y, dtype);
    quantize_values(
        w, {block, gpu::load(qmax + w.run_of(rows_a_qmax)), gaussian != 0, mid_rise != 0, packed != 0}, sums,
        peaks, v, q, s);
}
