// HadamardQuantize, one block a token. Example: DiT-XL/2, 512 tokens of 1152, RTX 4090 (1.0 TB/s, 82.6
// Tflop/s fp32).
//   bytes 512 * 1152 * (4 + 1) + scales = 2.95 MB / 1.0 TB/s  = 2.9 us   <- the bound
//   operations 512 * 1152 * (7 stages + 3)      / 82.6 T/s    = 0.07 us
// So: memory-bound. This version is simple and right: a row goes through shared memory tile by tile, twice
// where it has more than one tile (first for its statistic, then for its codes). Compiled without contraction
// to fused multiply-adds.
#include "gpu.h"
#include "row_scale.h"

namespace {

constexpr int kThreads = 256;

// The larger one; NaN where either is (fmaxf would drop it).
GPU_DEVICE float larger(float a, float b) { return a != a || b != b ? a + b : (a > b ? a : b); }

// The unnormalised fast Walsh-Hadamard transform of every block of n values; ends with a barrier.
GPU_DEVICE void load_rotated(const gpu::Shared<float>& t, const float* x, int64_t n, int64_t block) {
    for (int64_t i = gpu::thread(); i < n; i += kThreads) t.store(i, x[i]);
    gpu::sync_block();
    for (int64_t h = 1; h < block; h *= 2) {
        for (int64_t pair = gpu::thread(); pair < n / 2; pair += kThreads) {
            const int64_t i = pair / h * 2 * h + pair % h;
            const float a = t.load(i), b = t.load(i + h);
            t.store(i, a + b);
            t.store(i + h, a - b);
        }
        gpu::sync_block();
    }
}

}  // namespace

GPU_KERNEL(hadamard_quantize, const float* x, const float* qmax, int8_t* q, float* s, int64_t k,
           int64_t block, int64_t tile, int64_t rows_a_qmax, int64_t gaussian, int64_t mid_rise) {
    GPU_SHARED(double, sums, kThreads);
    GPU_SHARED(float, peaks, kThreads);
    const gpu::Shared<float> t = gpu::dynamic_shared<float>(tile);
    const int64_t row = gpu::block_x(), me = gpu::thread();

    // The square of a float is exact in float64, so every order of the additions rounds to the same float32
    // in the end.
    double sum = 0;
    float peak = 0;
    for (int64_t start = 0; start < k; start += tile) {
        const int64_t n = k - start < tile ? k - start : tile;
        if (start) gpu::sync_block();
        load_rotated(t, x + row * k + start, n, block);
        for (int64_t i = me; i < n; i += kThreads) {
            const float value = t.load(i), magnitude = fabsf(value);
            sum += (double)value * value;
            peak = larger(peak, magnitude);
        }
    }
    sums.store(me, sum);
    peaks.store(me, peak);
    gpu::sync_block();
    for (int half = kThreads / 2; half; half /= 2) {
        if (me < half) {
            sums.store(me, sums.load(me) + sums.load(me + half));
            peaks.store(me, larger(peaks.load(me), peaks.load(me + half)));
        }
        gpu::sync_block();
    }
    const float statistic = gaussian ? (float)sqrt(sums.load(0) / (double)k) : peaks.load(0);
    const float norm = 1.0f / sqrtf((float)block), limit = qmax[row / rows_a_qmax];
    const d2d::RowScale found = d2d::row_scale(statistic, limit, gaussian != 0, mid_rise != 0, norm);
    if (me == 0) s[row] = found.s;

    for (int64_t start = 0; start < k; start += tile) {
        const int64_t n = k - start < tile ? k - start : tile;
        if (k > tile) {
            gpu::sync_block();
            load_rotated(t, x + row * k + start, n, block);
        }
        for (int64_t i = me; i < n; i += kThreads) {
            const float scaled = t.load(i) * found.scale;
            const float nearest = mid_rise ? 2.0f * floorf(scaled) + 1.0f : rintf(scaled);
            const float code = found.scale == 0.0f ? 0.0f : nearest;
            q[row * k + start + i] = (int8_t)fminf(fmaxf(code, -limit), limit);
        }
    }
}
