// QuantMatMul for any CPU.
#include "products.h"

namespace d2d {

std::unique_ptr<CpuKernel> make_quant_matmul_portable() { return std::make_unique<Kernel>(); }

}  // namespace d2d
