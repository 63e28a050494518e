// HadamardQuantize: what its kernels share. Semantics: dit2deploy/ops/hadamard_quantize.py.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "op.h"
#include "row_scale.h"

namespace d2d {

inline float hadamard_norm(int64_t block) { return 1.0f / std::sqrt(static_cast<float>(block)); }

std::unique_ptr<CpuKernel> make_hadamard_quantize_portable(const Attributes&);
std::unique_ptr<CpuKernel> make_hadamard_quantize_avx2(const Attributes&);
std::unique_ptr<CpuKernel> make_hadamard_quantize_avx512(const Attributes&);
std::vector<CudaLaunch> plan_hadamard_quantize(const Attributes&, const std::vector<Tensor>& inputs,
                                               const std::vector<Tensor>& outputs);
Definition hadamard_quantize();

}  // namespace d2d
