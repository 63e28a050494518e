// MultiRegionQuantize, one block a row. Example: attention of DiT-XL/2, 2 x 16 heads of 256 x 256, RTX 4090.
//   bytes 2.1 M * (4 + 2) = 12.6 MB / 1.0 TB/s  = 13 us   <- the bound
//   operations 2.1 M * 10 / 82.6 T/s            = 0.3 us
// This version is simple and right: a row is read twice, first for NaN and inf, then (from the cache) for its codes.
#include "elements.h"
#include "gpu.h"

namespace {

constexpr int kThreads = 128;

GPU_DEVICE float inverse(float step) { return step >= 1e-30f ? 1.0f / step : 0.0f; }

}  // namespace

GPU_KERNEL(multi_region_quantize, const void* x, const float* qmax, const float* regions, int8_t* q_low,
           int8_t* q_high, float* s_low, float* s_high, int64_t k, int64_t rows_a_table, int64_t dtype) {
    GPU_SHARED(float, sums, kThreads);
    const int64_t row = gpu::block_x(), me = gpu::thread(), table = row / rows_a_table;
    // x - x is 0, or NaN where x is NaN or inf.
    float sum = 0;
    for (int64_t i = me; i < k; i += kThreads) {
        const float value = load_element(x, row * k + i, dtype);
        sum += value - value;
    }
    sums.store(me, sum);
    gpu::sync_block();
    for (int half = kThreads / 2; half; half /= 2) {
        if (me < half) sums.store(me, sums.load(me) + sums.load(me + half));
        gpu::sync_block();
    }
    const float trace = sums.load(0);
    const bool finite = trace == 0.0f;
    const float split = regions[table * 3], low = regions[table * 3 + 1], high = regions[table * 3 + 2];
    if (me == 0) {
        s_low[row] = finite ? low : trace;
        s_high[row] = finite ? high : trace;
    }
    const float limit = floorf(qmax[table]);
    for (int64_t i = me; i < k; i += kThreads) {
        const float value = load_element(x, row * k + i, dtype);
        const bool below = value < split;
        const float code =
            finite ? fminf(fmaxf(rintf(value * inverse(below ? low : high)), -limit), limit) : 0.0f;
        q_low[row * k + i] = (int8_t)(below ? code : 0.0f);
        q_high[row * k + i] = (int8_t)(below ? 0.0f : code);
    }
}
