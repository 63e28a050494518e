// HadamardQuantize in plain C++: the oracle of the other CPU kernels, and what runs where there is none.
#include <algorithm>
#include <cstring>

#include "hadamard_quantize.h"
#include "scratch.h"

namespace d2d {
namespace {

constexpr int64_t kRowsATask = 8;

void walsh_hadamard(float* t, int64_t k, int64_t block) {
    for (int64_t h = 1; h < block; h *= 2)
        for (int64_t start = 0; start < k; start += 2 * h)
            for (int64_t i = start; i < start + h; ++i) {
                const float a = t[i], b = t[i + h];
                t[i] = a + b;
                t[i + h] = a - b;
            }
}

float largest(const float* t, int64_t k) {
    float most = 0;
    for (int64_t i = 0; i < k; ++i) {
        const float magnitude = std::fabs(t[i]);
        if (!(magnitude <= std::numeric_limits<float>::max())) return std::numeric_limits<float>::quiet_NaN();
        most = std::max(most, magnitude);
    }
    return most;
}

// In float64: another order of the additions shows in the float32 result of next to no row,
// unless its large terms cancel.
float root_mean_square(const float* t, int64_t k) {
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += static_cast<double>(t[i]) * t[i];
    return static_cast<float>(std::sqrt(sum / static_cast<double>(k)));
}

class Kernel : public CpuKernel {
  public:
    explicit Kernel(const Attributes& attributes) : quantization_(attributes) {}

    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const int64_t m = inputs[0].shape.rows(), k = inputs[0].shape.last();
        if (m == 0) return;
        const int64_t rows_a_qmax = m / inputs[1].shape.count();
        parallel.run((m + kRowsATask - 1) / kRowsATask, [&](size_t task) {
            float* t = scratch<float>(k);
            const int64_t end = std::min<int64_t>(m, (task + 1) * kRowsATask);
            for (int64_t row = task * kRowsATask; row < end; ++row) {
                quantize_row_portable(quantization_, inputs[0].as<float>() + row * k, t, k,
                                      inputs[1].as<float>()[row / rows_a_qmax],
                                      outputs[0].as<int8_t>() + row * k, outputs[1].as<float>() + row);
            }
        });
    }

  private:
    RowQuantization quantization_;
};

}  // namespace

void quantize_row_portable(const RowQuantization& by, const float* x, float* t, int64_t k, float qmax,
                           int8_t* q, float* s) {
    if (t != x) std::memcpy(t, x, static_cast<size_t>(k) * sizeof(float));
    walsh_hadamard(t, k, by.block);
    const float statistic = by.gaussian ? root_mean_square(t, k) : largest(t, k);
    const RowScale found = row_scale(statistic, qmax, by.gaussian, by.mid_rise, by.norm);
    *s = found.s;
    if (found.scale == 0) {
        std::memset(q, 0, k);
    } else if (by.mid_rise) {
        for (int64_t i = 0; i < k; ++i)
            q[i] = static_cast<int8_t>(std::clamp(2 * std::floor(t[i] * found.scale) + 1, -qmax, qmax));
    } else {
        for (int64_t i = 0; i < k; ++i)
            q[i] = static_cast<int8_t>(std::clamp(std::nearbyint(t[i] * found.scale), -qmax, qmax));
    }
}

std::unique_ptr<CpuKernel> make_hadamard_quantize_portable(const Attributes& attributes) {
    return std::make_unique<Kernel>(attributes);
}

}  // namespace d2d
