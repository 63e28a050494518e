// MultiRegionQuantize: what its kernels share. Semantics: dit2deploy/ops/multi_region_quantize.py.
#pragma once

#include <memory>
#include <vector>

#include "op.h"

namespace d2d {

std::unique_ptr<CpuKernel> make_multi_region_quantize_portable();
std::unique_ptr<CpuKernel> make_multi_region_quantize_avx2();
std::unique_ptr<CpuKernel> make_multi_region_quantize_avx512();
std::vector<CudaLaunch> plan_multi_region_quantize(const Attributes&, const std::vector<Tensor>& inputs,
                                                   const std::vector<Tensor>& outputs, const CudaMeans&);
Definition multi_region_quantize();

}  // namespace d2d
