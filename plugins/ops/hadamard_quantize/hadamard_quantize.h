// HadamardQuantize: what its kernels share. Semantics: dit2deploy/ops/hadamard_quantize.py.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "op.h"

namespace d2d {

// MSE-optimal step of a unit normal for codes -qmax..qmax; the same table as in Python.
constexpr int kGaussianLevels = 7;
constexpr float kGaussianLevel[kGaussianLevels] = {1, 3, 7, 15, 31, 63, 127};
constexpr float kGaussianStep[kGaussianLevels] = {1.224006f, 0.650770f, 0.353411f, 0.193249f,
                                                  0.105488f, 0.057261f, 0.030870f};
constexpr float kSmallest = 1e-30f;

inline float gaussian_step(float qmax) {
    int count = 0;
    for (float level : kGaussianLevel) count += qmax >= level;
    return kGaussianStep[count > 0 ? count - 1 : 0];
}

// How a row is quantized once its statistic is known. scale is what t is multiplied with; 0: all codes are 0.
struct RowScale {
    float scale;
    float s;
};

// statistic: the largest |t| of the row, or its root mean square; NaN or inf where the row is not finite.
inline RowScale row_scale(float statistic, float qmax, bool gaussian, float norm) {
    if (!(statistic <= std::numeric_limits<float>::max()))
        return {0, std::numeric_limits<float>::quiet_NaN()};
    if (statistic < kSmallest) return {0, 0};
    if (gaussian) {
        const float step = gaussian_step(qmax) * statistic;
        return {1.0f / step, step * norm};
    }
    return {qmax / statistic, statistic / qmax * norm};
}

inline float hadamard_norm(int64_t block) { return 1.0f / std::sqrt(static_cast<float>(block)); }

std::unique_ptr<CpuKernel> make_hadamard_quantize_portable(const Attributes&);
std::unique_ptr<CpuKernel> make_hadamard_quantize_avx2(const Attributes&);
std::unique_ptr<CpuKernel> make_hadamard_quantize_avx512(const Attributes&);
std::vector<CudaLaunch> plan_hadamard_quantize(const Attributes&, const std::vector<Tensor>& inputs,
                                               const std::vector<Tensor>& outputs);
Definition hadamard_quantize();

}  // namespace d2d
