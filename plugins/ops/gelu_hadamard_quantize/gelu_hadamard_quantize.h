// GeluHadamardQuantize and GeluHadamardQuantizeKeep: what their kernels share. Semantics:
// dit2deploy/ops/gelu_hadamard_quantize.py.
#pragma once

#include <vector>

#include "hadamard_quantize/hadamard_quantize.h"
#include "op.h"

namespace d2d {

// What one instruction set does with a row of K values, a multiple of `width`.
struct GeluRows {
    int64_t width;
    void (*activate)(const float* x, int64_t k, float* y);
    QuantizeRow quantize;
};

GeluRows gelu_rows_portable();
GeluRows gelu_rows_avx2();
GeluRows gelu_rows_avx512();
GeluRows gelu_rows_neon();
std::vector<CudaLaunch> plan_gelu_hadamard_quantize(const Attributes&, const std::vector<Tensor>& inputs,
                                                    const std::vector<Tensor>& outputs, const CudaMeans&);
Definition gelu_hadamard_quantize();
Definition gelu_hadamard_quantize_keep();

}  // namespace d2d
