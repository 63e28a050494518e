// HadamardQuantize for NEON: 4 floats a vector.
#include "vector_rows.h"

namespace d2d {

std::unique_ptr<CpuKernel> make_hadamard_quantize_neon(const Attributes& attributes) {
    return std::unique_ptr<CpuKernel>(new VectorKernel<4>(attributes));
}

}  // namespace d2d
