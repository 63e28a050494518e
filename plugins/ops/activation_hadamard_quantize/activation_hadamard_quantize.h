// ActivationHadamardQuantize and ActivationHadamardQuantizeKeep: what their kernels share. Semantics:
// dit2deploy/ops/activation_hadamard_quantize.py.
#pragma once

#include <vector>

#include "hadamard_quantize/hadamard_quantize.h"
#include "op.h"

namespace d2d {

// What one instruction set does with a row of K values, a multiple of `width`.
struct ActivationRows {
    int64_t width;
    void (*activate)(const float* x, int64_t k, float* y);
    QuantizeRow quantize;
};

ActivationRows activation_rows_portable();
ActivationRows activation_rows_avx2();
ActivationRows activation_rows_avx512();
ActivationRows activation_rows_neon();
std::vector<CudaLaunch> plan_activation_hadamard_quantize(const Attributes&,
                                                          const std::vector<Tensor>& inputs,
                                                          const std::vector<Tensor>& outputs);
Definition activation_hadamard_quantize();
Definition activation_hadamard_quantize_keep();

}  // namespace d2d
