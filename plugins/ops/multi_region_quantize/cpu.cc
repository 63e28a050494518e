// MultiRegionQuantize for any CPU.
#include "rows.h"

namespace d2d {

std::unique_ptr<CpuKernel> make_multi_region_quantize_portable() { return std::make_unique<Kernel>(); }

}  // namespace d2d
