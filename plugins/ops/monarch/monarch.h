// MonarchAdd: what its kernels share. Semantics: dit2deploy/ops/monarch.py.
#pragma once

#include <memory>
#include <vector>

#include "op.h"

namespace d2d {

// The ports as numbers. z[b, a * rank + i] = down[a, i * b_count + b] . (block a of x); output s * b_count + b is
// plain + up[b, s] . z[b].
struct MonarchProblem {
    int64_t m, n, k;
    int64_t blocks_in, blocks_out, rank;
    int64_t width, height;  // of a block: k / blocks_in, n / blocks_out
    const float* plain;
    const float* x;
    const float* down;  // [blocks_in, rank * blocks_out, width]
    const float* up;    // [blocks_out, height, blocks_in * rank]
    float* y;

    MonarchProblem(const Tensor* inputs, const Tensor* outputs);

    int64_t inner() const { return blocks_in * rank; }       // values of z an output block reads
    int64_t values() const { return blocks_out * inner(); }  // of z, for one token
    int64_t rows_down() const { return rank * blocks_out; }  // rows of an input block in `down`
    int64_t place(int64_t block_in, int64_t row) const {     // in z, of row `row` of an input block
        return row % blocks_out * inner() + block_in * rank + row / blocks_out;
    }
};

std::unique_ptr<CpuKernel> make_monarch_add_portable();
std::unique_ptr<CpuKernel> make_monarch_add_avx2();
std::unique_ptr<CpuKernel> make_monarch_add_avx512();
std::vector<CudaLaunch> plan_monarch_add(const Attributes&, const std::vector<Tensor>& inputs,
                                         const std::vector<Tensor>& outputs);
Definition monarch_add();

}  // namespace d2d
