// Which kernels a plan gives a GPU where there is a choice.
#pragma once

namespace d2d {

// Whether the environment variable DIT2DEPLOY_CUDA asks for kernels on wgmma. Throws std::invalid_argument, naming what it may
// say, for anything else.
bool wgmma_is_asked_for();

}  // namespace d2d
