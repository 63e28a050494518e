// Which kernels a GPU is given where it has a choice.
#pragma once

#include "op.h"

namespace d2d {

// Whether the environment variable DIT2DEPLOY_CUDA asks for kernels on wgmma. Throws std::invalid_argument, naming what it may
// say, for anything else.
bool wgmma_is_asked_for();

// What runs in place of `launch` on a GPU that has it.
inline const CudaLaunch& chosen(const CudaLaunch& launch, bool wgmma) {
    return wgmma && launch.on_wgmma ? *launch.on_wgmma : launch;
}

}  // namespace d2d
