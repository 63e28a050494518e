// ActivationHadamardQuantize, GatedActivationHadamardQuantize and both with Keep: what their kernels share. Semantics:
// dit2deploy/ops/activation_hadamard_quantize.py.
#pragma once

#include <vector>

#include "activation.h"
#include "hadamard_quantize/hadamard_quantize.h"
#include "op.h"

namespace d2d {

// What one instruction set does with a row of K values, a multiple of `width`.
struct ActivationRows {
    int64_t width;
    // y = activation(x), times factor where that is not null
    void (*activate)(Activation, const float* x, const float* factor, int64_t k, float* y);
    QuantizeRow quantize;
};

ActivationRows activation_rows_portable();
ActivationRows activation_rows_avx2();
ActivationRows activation_rows_avx512();
ActivationRows activation_rows_neon();

Activation activation_of(const Attributes&);
std::vector<CudaLaunch> plan_activation_hadamard_quantize(const Attributes&,
                                                          const std::vector<Tensor>& inputs,
                                                          const std::vector<Tensor>& outputs,
                                                          const CudaMeans&);
Definition activation_hadamard_quantize();
Definition activation_hadamard_quantize_keep();
Definition gated_activation_hadamard_quantize();
Definition gated_activation_hadamard_quantize_keep();

}  // namespace d2d
