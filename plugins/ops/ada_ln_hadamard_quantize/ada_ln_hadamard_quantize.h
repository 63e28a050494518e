// AdaLnHadamardQuantize and AdaLnHadamardQuantizeKeep: what their kernels share. Semantics:
// dit2deploy/ops/ada_ln_hadamard_quantize.py.
#pragma once

#include <vector>

#include "hadamard_quantize/hadamard_quantize.h"
#include "op.h"

namespace d2d {

// What one instruction set does with a row of K values, a multiple of `width`.
struct AdaLnRows {
    int64_t width;
    // y = LayerNorm(x) (1 + scale) + shift
    void (*modulate)(const float* x, const float* shift, const float* scale, float eps, int64_t k, float* y);
    QuantizeRow quantize;
};

AdaLnRows ada_ln_rows_portable();
AdaLnRows ada_ln_rows_avx2();
AdaLnRows ada_ln_rows_avx512();
AdaLnRows ada_ln_rows_neon();
std::vector<CudaLaunch> plan_ada_ln_hadamard_quantize(const Attributes&, const std::vector<Tensor>& inputs,
                                                      const std::vector<Tensor>& outputs, const CudaMeans&);
Definition ada_ln_hadamard_quantize();
Definition ada_ln_hadamard_quantize_keep();

}  // namespace d2d
