// QuantMatMul: what its kernels share. Semantics: dit2deploy/ops/quant_matmul.py.
#pragma once

#include <memory>
#include <vector>

#include "op.h"

namespace d2d {

// The ports as numbers; a head is one item's one head.
struct MatMulProblem {
    int64_t heads, m, n, k;
    const int8_t* a;
    const float* sa;
    const int8_t* b;
    const float* sb;
    float* y;

    MatMulProblem(const Tensor* inputs, const Tensor* outputs);
};

std::unique_ptr<CpuKernel> make_quant_matmul_portable();
std::unique_ptr<CpuKernel> make_quant_matmul_avx2();
std::unique_ptr<CpuKernel> make_quant_matmul_avx512();
std::vector<CudaLaunch> plan_quant_matmul(const Attributes&, const std::vector<Tensor>& inputs,
                                          const std::vector<Tensor>& outputs, const CudaMeans&);
Definition quant_matmul();

}  // namespace d2d
