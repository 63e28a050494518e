// QuantMatMul for AVX2.
#include "products.h"

namespace d2d {

std::unique_ptr<CpuKernel> make_quant_matmul_avx2() { return std::make_unique<Kernel>(); }

}  // namespace d2d
