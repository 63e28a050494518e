// Reads the environment variable that chooses kernels for GPUs.
#include "cuda_choice.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace d2d {

bool wgmma_is_asked_for() {
    const char* given = std::getenv("DIT2DEPLOY_CUDA");
    const std::string asked = given && *given ? given : "mma";
    if (asked != "mma" && asked != "wgmma")
        throw std::invalid_argument(
            "DIT2DEPLOY_CUDA=" + asked +
            " names no kernels; known: mma (on every GPU, the default), wgmma (compute "
            "capability 9.0)");
    return asked == "wgmma";
}

}  // namespace d2d
