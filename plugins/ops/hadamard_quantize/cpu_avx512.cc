// HadamardQuantize for AVX-512: 16 floats a vector.
#include "vector_rows.h"

namespace d2d {

std::unique_ptr<CpuKernel> make_hadamard_quantize_avx512(const Attributes& attributes) {
    return std::unique_ptr<CpuKernel>(new VectorKernel<16>(attributes));
}

}  // namespace d2d
