// Runs a planned launch through the emulator.
#pragma once

#include "emulator.h"
#include "op.h"

namespace d2d {

// All launches in order, in three orders of the threads; throws std::runtime_error with the emulator's report.
inline void run_on_host(const std::vector<CudaLaunch>& launches, const std::vector<Tensor>& inputs,
                        const std::vector<Tensor>& outputs) {
    for (unsigned seed : {0u, 1u, 2u})
        for (const CudaLaunch& launch : launches) {
            if (launch.on_wgmma && gpu::host::capability() != 90)
                throw std::runtime_error(
                    "DIT2DEPLOY_CUDA=wgmma needs the emulated GPU of D2D_HOST_CAPABILITY=90");
            gpu::host::Grid grid{};
            for (int i = 0; i < 3; ++i) {
                grid.grid[i] = launch.grid[i];
                grid.block[i] = launch.block[i];
            }
            grid.shared_bytes = launch.shared_bytes;
            grid.seed = seed;
            for (const std::vector<Tensor>& tensors : {inputs, outputs})
                for (const Tensor& tensor : tensors) grid.memory.push_back({tensor.data, tensor.bytes()});
            gpu::host::launch(launch.function, grid, launch.words);
        }
}

}  // namespace d2d
