// <Format>Gemm, plain, LowRank, Residual and LowRankResidual: what their kernels share. Semantics: dit2deploy/ops/quant_gemm.py.
#pragma once

#include <memory>
#include <vector>

#include "formats.h"
#include "op.h"

namespace d2d {

// What an op has beside product and bias.
struct GemmTerms {
    bool low_rank, residual;

    constexpr int first_residual() const { return low_rank ? 7 : 5; }  // input port; the gate is the next
};

// The ports as numbers: v[m, n] = s[m] * sum_g ws[n, g] * (sum of group g of q[m, k] w[n, k]) + bias[n] +
// t[m] . up[n]; y = v, or y[m, n] = residual[m, n] + gate[m / tokens_a_gate, n] * v[m, n].
struct GemmProblem {
    int64_t m, n, k, groups, rank, tokens_a_gate;
    bool packed;  // two codes a byte of q (op.h)
    const int8_t* q;
    const float* s;
    const int32_t* w;
    const float* ws;
    const float* bias;
    const float* t;         // [M, rank], nullptr without a branch
    const float* up;        // [N, rank]
    const float* residual;  // [M, N], nullptr without one
    const float* gate;      // [M / tokens_a_gate, N]
    float* y;

    GemmProblem(const Tensor* inputs, const Tensor* outputs, GemmTerms terms, bool packed = false);
};

std::unique_ptr<CpuKernel> make_quant_gemm_portable(const FormatSpec&, const Attributes&, GemmTerms terms);
std::unique_ptr<CpuKernel> make_quant_gemm_avx2(const FormatSpec&, const Attributes&, GemmTerms terms);
// AVX2 with byte dot products.
std::unique_ptr<CpuKernel> make_quant_gemm_avxvnni(const FormatSpec&, const Attributes&, GemmTerms terms);
std::unique_ptr<CpuKernel> make_quant_gemm_avx512(const FormatSpec&, const Attributes&, GemmTerms terms);
std::unique_ptr<CpuKernel> make_quant_gemm_neon(const FormatSpec&, const Attributes&, GemmTerms terms);
// NEON with the byte dot products of Armv8.2, and with the byte matrix products of Armv8.6.
std::unique_ptr<CpuKernel> make_quant_gemm_dotprod(const FormatSpec&, const Attributes&, GemmTerms terms);
std::unique_ptr<CpuKernel> make_quant_gemm_i8mm(const FormatSpec&, const Attributes&, GemmTerms terms);
// By table look-up where that wins, else `rest`.
std::unique_ptr<CpuKernel> make_lookup_avx2(const FormatSpec&, std::unique_ptr<CpuKernel> rest,
                                            GemmTerms terms);
std::unique_ptr<CpuKernel> make_lookup_avx512(const FormatSpec&, std::unique_ptr<CpuKernel> rest,
                                              GemmTerms terms);
std::unique_ptr<CpuKernel> make_lookup_neon(const FormatSpec&, std::unique_ptr<CpuKernel> rest,
                                            GemmTerms terms);
std::vector<CudaLaunch> plan_quant_gemm(const FormatSpec&, GemmTerms terms, const Attributes&,
                                        const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
                                        const CudaMeans&);
// Definition's `tactics`, `takes_tactic` and `workspace_cuda`.
std::vector<const char*> quant_gemm_tactics();
bool quant_gemm_takes_tactic(GemmTerms terms, const Attributes&, const std::vector<Tensor>& inputs,
                             const std::vector<Tensor>& outputs, int tactic);
size_t quant_gemm_workspace(GemmTerms terms, const Attributes&, const std::vector<Tensor>& inputs,
                            const std::vector<Tensor>& outputs);

// All ops: each format, plain, with a low-rank branch, with gate and residual, with both.
std::vector<Definition> quant_gemms();

}  // namespace d2d
