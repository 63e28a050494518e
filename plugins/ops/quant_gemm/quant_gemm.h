// <Format>Gemm and <Format>GemmLowRank: what their kernels share. Semantics: dit2deploy/ops/quant_gemm.py.
#pragma once

#include <memory>
#include <vector>

#include "formats.h"
#include "op.h"

namespace d2d {

// The ports as numbers: y[m, n] = s[m] * sum_g ws[n, g] * (sum of group g of q[m, k] w[n, k]) + bias[n] +
// t[m] . up[n].
struct GemmProblem {
    int64_t m, n, k, groups, rank;
    const int8_t* q;
    const float* s;
    const int32_t* w;
    const float* ws;
    const float* bias;
    const float* t;   // [M, rank], nullptr without a branch
    const float* up;  // [N, rank]
    float* y;

    GemmProblem(const Tensor* inputs, const Tensor* outputs, bool low_rank);
};

std::unique_ptr<CpuKernel> make_quant_gemm_portable(const FormatSpec&, const Attributes&, bool low_rank);
std::unique_ptr<CpuKernel> make_quant_gemm_avx2(const FormatSpec&, const Attributes&, bool low_rank);
// AVX2 with byte dot products.
std::unique_ptr<CpuKernel> make_quant_gemm_avxvnni(const FormatSpec&, const Attributes&, bool low_rank);
std::unique_ptr<CpuKernel> make_quant_gemm_avx512(const FormatSpec&, const Attributes&, bool low_rank);
std::unique_ptr<CpuKernel> make_quant_gemm_neon(const FormatSpec&, const Attributes&, bool low_rank);
// NEON with the byte dot products of Armv8.2, and with the byte matrix products of Armv8.6.
std::unique_ptr<CpuKernel> make_quant_gemm_dotprod(const FormatSpec&, const Attributes&, bool low_rank);
std::unique_ptr<CpuKernel> make_quant_gemm_i8mm(const FormatSpec&, const Attributes&, bool low_rank);
// By table look-up where that wins, else `rest`.
std::unique_ptr<CpuKernel> make_lookup_avx2(const FormatSpec&, std::unique_ptr<CpuKernel> rest,
                                            bool low_rank);
std::unique_ptr<CpuKernel> make_lookup_avx512(const FormatSpec&, std::unique_ptr<CpuKernel> rest,
                                              bool low_rank);
std::unique_ptr<CpuKernel> make_lookup_neon(const FormatSpec&, std::unique_ptr<CpuKernel> rest,
                                            bool low_rank);
std::vector<CudaLaunch> plan_quant_gemm(const FormatSpec&, bool low_rank, const Attributes&,
                                        const std::vector<Tensor>& inputs,
                                        const std::vector<Tensor>& outputs);

// All eight ops: each format, plain and with a low-rank branch.
std::vector<Definition> quant_gemms();

}  // namespace d2d
