// HadamardQuantize: what its kernels share. Semantics: dit2deploy/ops/hadamard_quantize.py.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "op.h"
#include "row_scale.h"

namespace d2d {

inline float hadamard_norm(int64_t block) { return 1.0f / std::sqrt(static_cast<float>(block)); }

// How a node quantizes its rows: its attributes.
struct RowQuantization {
    int64_t block;
    bool gaussian, mid_rise;
    float norm;

    explicit RowQuantization(const Attributes& attributes)
        : block(attributes.integer("block")),
          gaussian(attributes.text("clip") == "gaussian"),
          mid_rise(attributes.text("grid") == "mid-rise"),
          norm(hadamard_norm(block)) {}
};

// Codes q and step s of one row x of K values; t [K] is where its rotation goes: x itself or memory apart from it.
using QuantizeRow = void (*)(const RowQuantization&, const float* x, float* t, int64_t k, float qmax,
                             int8_t* q, float* s);
void quantize_row_portable(const RowQuantization&, const float* x, float* t, int64_t k, float qmax, int8_t* q,
                           float* s);

// What every op that quantizes rows in this way asks of its attributes and of the shapes of x and qmax: "" or what is
// wrong.
std::string check_row_attributes(const Attributes&);
std::string check_row_shapes(const Attributes&, const Shape& x, const Shape& qmax);

std::unique_ptr<CpuKernel> make_hadamard_quantize_portable(const Attributes&);
std::unique_ptr<CpuKernel> make_hadamard_quantize_avx2(const Attributes&);
std::unique_ptr<CpuKernel> make_hadamard_quantize_avx512(const Attributes&);
std::unique_ptr<CpuKernel> make_hadamard_quantize_neon(const Attributes&);

// Names of the CUDA kernels of an op of this family: through shared memory, and in registers.
struct RowKernels {
    const char *any, *warps;
    int64_t most_warps;  // of a row, for the latter: what its registers allow
};
// The launch that prepares and quantizes the rows of x; `own` are the kernel's parameters beside HadamardQuantize's,
// `vectors` the tensors among them that it reads or writes 16 bytes at a time.
std::vector<CudaLaunch> plan_rows(const RowKernels&, const Attributes&, const Tensor& x, const Tensor& qmax,
                                  const std::vector<Tensor>& outputs, const std::vector<uint64_t>& own,
                                  std::vector<const void*> vectors);
std::vector<CudaLaunch> plan_hadamard_quantize(const Attributes&, const std::vector<Tensor>& inputs,
                                               const std::vector<Tensor>& outputs, const CudaMeans&);
Definition hadamard_quantize();

}  // namespace d2d
