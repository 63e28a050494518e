// MultiRegionQuantize in loops that compilers make vectors of: one source for every instruction set.
//
// Bounds for attention of DiT-XL/2, 16 heads of 256 x 256, one core at 3.2 GHz with 8 floats a vector:
//   bytes 1 M * (4 + 2) = 6.3 MB / 20 GB/s = 0.31 ms                                              <- the bound
//   operations 1 M / 8 * about 14 (look for NaN 2, select, multiply, clamp 2, round, planes 2, narrow 5) at four
//   a cycle = 0.14 ms
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "multi_region_quantize.h"

namespace d2d {
namespace {

constexpr int64_t kValuesATask = 1 << 14;
constexpr float kSmallestStep = 1e-30f;

// Magnitudes are ordered as their bits are, and NaN and inf come last.
inline bool all_finite(const float* __restrict x, int64_t k) {
    int32_t most = 0;
    for (int64_t i = 0; i < k; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most < 0x7f800000;
}

struct Table {
    float split, low, high, top;
};

inline void quantize_row(const float* __restrict x, int64_t k, Table t, int8_t* __restrict q_low,
                         int8_t* __restrict q_high) {
    for (int64_t i = 0; i < k; ++i) {
        const bool below = x[i] < t.split;
        float value = x[i] * (below ? t.low : t.high);
        value = value > t.top ? t.top : value;
        value = value < -t.top ? -t.top : value;
        // Adding 1.5 * 2**23 rounds half to even and leaves the integer in the low byte.
        const float shifted = value + 12582912.0f;
        int32_t bits;
        std::memcpy(&bits, &shifted, 4);
        q_low[i] = static_cast<int8_t>(below ? bits : 0);
        q_high[i] = static_cast<int8_t>(below ? 0 : bits);
    }
}

class Kernel : public CpuKernel {
  public:
    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const int64_t m = inputs[0].shape.rows(), k = inputs[0].shape.last();
        if (m == 0) return;
        const int64_t rows_a_table = m / inputs[1].shape.count();
        const int64_t rows_a_task = std::max<int64_t>(1, kValuesATask / k);
        parallel.run(static_cast<size_t>((m + rows_a_task - 1) / rows_a_task), [&](size_t task) {
            const int64_t begin = static_cast<int64_t>(task) * rows_a_task;
            const int64_t end = std::min(m, begin + rows_a_task);
            for (int64_t row = begin; row < end; ++row) {
                const float* x = inputs[0].as<float>() + row * k;
                const float qmax = inputs[1].as<float>()[row / rows_a_table];
                const float* region = inputs[2].as<float>() + row / rows_a_table * 3;
                int8_t *q_low = outputs[0].as<int8_t>() + row * k,
                       *q_high = outputs[1].as<int8_t>() + row * k;
                const bool finite = all_finite(x, k);
                const float nan = std::numeric_limits<float>::quiet_NaN();
                outputs[2].as<float>()[row] = finite ? region[1] : nan;
                outputs[3].as<float>()[row] = finite ? region[2] : nan;
                if (finite) {
                    // Codes are integers: a qmax between two allows what the lower one allows.
                    quantize_row(x, k, {region[0], inverse(region[1]), inverse(region[2]), std::floor(qmax)},
                                 q_low, q_high);
                } else {
                    std::memset(q_low, 0, static_cast<size_t>(k));
                    std::memset(q_high, 0, static_cast<size_t>(k));
                }
            }
        });
    }

  private:
    static float inverse(float step) { return step >= kSmallestStep ? 1.0f / step : 0.0f; }
};

}  // namespace
}  // namespace d2d
