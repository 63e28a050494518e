// HadamardQuantize. Example: DiT-XL/2, 512 tokens of 1152, RTX 4090 (1.0 TB/s, 82.6
// Tflop/s fp32, 0.65 T/s in float64 without contraction).
//   bytes 512 * 1152 * (4 + 1) + scales = 2.95 MB / 1.0 TB/s  = 2.9 us   <- the bound (of halves 1.8 us; packed 2.7, 1.5)
//   operations 512 * 1152 * (7 stages + 3)      / 82.6 T/s    = 0.07 us
//   with the gaussian clip 512 * 1152 * 3 in float64 / 0.65 T/s = 2.7 us
// So: memory-bound, with that clip only just on cards with few float64 units. Two kernels; cuda_plan.cc chooses:
//   warps (cuda_warp_rows.h)  a row in the registers of a warp or a few: one read, one write
//   any (cuda_rows.h)         a block of threads a row, through shared memory: every K, block and address
// Compiled without contraction to fused multiply-adds.
#include "cuda_rows.h"
#include "cuda_warp_rows.h"

GPU_KERNEL(hadamard_quantize, const void* x, const float* qmax, int8_t* q, float* s, int64_t k, int64_t block,
           int64_t tile, int64_t rows_a_qmax, int64_t gaussian, int64_t mid_rise, int64_t packed,
           int64_t dtype) {
    GPU_SHARED(double, sums, kThreads);
    GPU_SHARED(float, peaks, kThreads);
    const gpu::Shared<float> t = gpu::dynamic_shared<float>(tile);
    const int64_t row = gpu::block_x();
    quantize_row(Row{x, row * k, dtype}, sums, peaks, t,
                 {k, block, tile, qmax[row / rows_a_qmax], gaussian != 0, mid_rise != 0, packed != 0},
                 q + row * (packed ? k / 2 : k), s + row);
}

GPU_KERNEL_OF(kMostWarps* kLanes, 1, hadamard_quantize_warps, const void* x, const float* qmax, int8_t* q,
              float* s, int64_t k, int64_t block, int64_t m, int64_t rows_a_qmax, int64_t gaussian,
              int64_t mid_rise, int64_t packed, int64_t dtype) {
    GPU_SHARED(double, sums, kMostWarps);
    GPU_SHARED(int, peaks, kMostWarps);
    const WarpRow w = warp_row(m, k);
    Values v;
    load_row(w, x, dtype, v);
    quantize_values(
        w, {block, gpu::load(qmax + w.run_of(rows_a_qmax)), gaussian != 0, mid_rise != 0, packed != 0}, sums,
        peaks, v, q, s);
}
