// MonarchAdd: what its kernels share. Semantics: dit2deploy/ops/monarch.py.
#pragma once

#include <memory>
#include <vector>

#include "op.h"

namespace d2d {

// The ports as numbers. For a in blocks_in, i in rank, b in blocks_out:
//     z[a, i, b] = sum over k of block a of x[k] down[k, i, b]
//     y[o] = plain[o] + sum over (a, i) of z[a, i, o % blocks_out] up[a, i, o]
struct MonarchProblem {
    int64_t m, n, k;
    int64_t blocks_in, blocks_out, rank;
    const float* plain;
    const float* x;
    const float* down;  // [k, rank, blocks_out]
    const float* up;    // [blocks_in, rank, n]
    float* y;

    MonarchProblem(const Tensor* inputs, const Tensor* outputs);

    int64_t width() const { return k / blocks_in; }           // of a block of inputs
    int64_t columns() const { return rank * blocks_out; }     // of z, of one block of inputs
    int64_t inner() const { return blocks_in * rank; }        // terms of an output
    int64_t values() const { return blocks_in * columns(); }  // of z, of one token
};

std::unique_ptr<CpuKernel> make_monarch_add_portable();
std::unique_ptr<CpuKernel> make_monarch_add_avx2();
std::unique_ptr<CpuKernel> make_monarch_add_avx512();
std::unique_ptr<CpuKernel> make_monarch_add_neon();
std::vector<CudaLaunch> plan_monarch_add(const Attributes&, const std::vector<Tensor>& inputs,
                                         const std::vector<Tensor>& outputs, const CudaMeans&);
Definition monarch_add();

}  // namespace d2d
