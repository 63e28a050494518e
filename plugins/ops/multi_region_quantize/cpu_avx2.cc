// MultiRegionQuantize for AVX2.
#include "rows.h"

namespace d2d {

std::unique_ptr<CpuKernel> make_multi_region_quantize_avx2() { return std::make_unique<Kernel>(); }

}  // namespace d2d
