// HadamardQuantize for AVX2: 8 floats a vector.
#include "vector_rows.h"

namespace d2d {

std::unique_ptr<CpuKernel> make_hadamard_quantize_avx2(const Attributes& attributes) {
    return std::unique_ptr<CpuKernel>(new VectorKernel<8>(attributes));
}

}  // namespace d2d
