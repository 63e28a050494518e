// How one block of threads rotates and quantizes one row: shared by the CUDA kernels of this family.
#pragma once

#include "elements.h"
#include "gpu.h"
#include "row_scale.h"

namespace {

constexpr int kThreads = 256;

struct RowPlan {
    int64_t k, block, tile;
    float limit;  // qmax of the row
    bool gaussian, mid_rise, packed;
};

// A row of x, which begins at its element `first`.
struct Row {
    const void* x;
    int64_t first, dtype;

    GPU_DEVICE float operator()(int64_t i) const { return load_element(x, first + i, dtype); }
};

// The larger one; NaN where either is (fmaxf would drop it).
GPU_DEVICE float larger(float a, float b) { return a != a || b != b ? a + b : (a > b ? a : b); }

// The sum of the threads' values, in every thread; begins and ends with a barrier.
GPU_DEVICE double sum_of_block(const gpu::Shared<double>& sums, double value) {
    const int64_t me = gpu::thread();
    sums.store(me, value);
    gpu::sync_block();
    for (int half = kThreads / 2; half; half /= 2) {
        if (me < half) sums.store(me, sums.load(me) + sums.load(me + half));
        gpu::sync_block();
    }
    const double total = sums.load(0);
    gpu::sync_block();
    return total;
}

// The largest of the threads' values, NaN where one is.
GPU_DEVICE float peak_of_block(const gpu::Shared<float>& peaks, float value) {
    const int64_t me = gpu::thread();
    peaks.store(me, value);
    gpu::sync_block();
    for (int half = kThreads / 2; half; half /= 2) {
        if (me < half) peaks.store(me, larger(peaks.load(me), peaks.load(me + half)));
        gpu::sync_block();
    }
    const float peak = peaks.load(0);
    gpu::sync_block();
    return peak;
}

// The unnormalised fast Walsh-Hadamard transform of every block of values [start, start + n); ends with a barrier.
template <class Source>
GPU_DEVICE void load_rotated(const gpu::Shared<float>& t, const Source& x, int64_t start, int64_t n,
                             int64_t block) {
    for (int64_t i = gpu::thread(); i < n; i += kThreads) t.store(i, x(start + i));
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

// Codes and step of the row whose values x(i) gives. It goes through t tile by tile, twice where it has more than one
// (first for its statistic, then for its codes).
template <class Source>
GPU_DEVICE void quantize_row(const Source& x, const gpu::Shared<double>& sums,
                             const gpu::Shared<float>& peaks, const gpu::Shared<float>& t, const RowPlan& p,
                             int8_t* q, float* s) {
    // In float64, as everywhere (cpu.cc).
    double sum = 0;
    float peak = 0;
    for (int64_t start = 0; start < p.k; start += p.tile) {
        const int64_t n = p.k - start < p.tile ? p.k - start : p.tile;
        if (start) gpu::sync_block();
        load_rotated(t, x, start, n, p.block);
        for (int64_t i = gpu::thread(); i < n; i += kThreads) {
            const float value = t.load(i), magnitude = fabsf(value);
            sum += (double)value * value;
            peak = larger(peak, magnitude);
        }
    }
    const float statistic =
        p.gaussian ? (float)sqrt(sum_of_block(sums, sum) / (double)p.k) : peak_of_block(peaks, peak);
    const d2d::RowScale found =
        d2d::row_scale(statistic, p.limit, p.gaussian, p.mid_rise, 1.0f / sqrtf((float)p.block), p.packed);
    if (gpu::thread() == 0) *s = found.s;
    // Of the value at i of the tile.
    const auto code_of = [&](int64_t i) {
        const float scaled = t.load(i) * found.scale;
        const float nearest = p.mid_rise ? 2.0f * floorf(scaled) + 1.0f : rintf(scaled);
        const float code = found.scale == 0.0f ? 0.0f : nearest;
        return (int8_t)fminf(fmaxf(code, -p.limit), p.limit);
    };

    for (int64_t start = 0; start < p.k; start += p.tile) {
        const int64_t n = p.k - start < p.tile ? p.k - start : p.tile;
        if (p.k > p.tile) {
            gpu::sync_block();
            load_rotated(t, x, start, n, p.block);
        }
        if (p.packed) {
            // Of runs of 64 values; a tile is whole runs, as K is.
            for (int64_t i = gpu::thread(); i < n / 2; i += kThreads) {
                const int64_t low = i / 32 * 64 + i % 32;
                q[start / 2 + i] = (int8_t)((code_of(low) & 15) + 16 * code_of(low + 32));
            }
        } else {
            for (int64_t i = gpu::thread(); i < n; i += kThreads) q[start + i] = code_of(i);
        }
    }
}

}  // namespace
