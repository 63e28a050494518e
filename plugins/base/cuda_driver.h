// The CUDA driver, found at run time: one library serves machines with and without a GPU.
#pragma once

#include <vector>

#include "op.h"

struct CUstream_st;

namespace d2d {

// Loads the embedded kernels into the current context, if that was not done before. Throws std::runtime_error
// with cause and cure where there is no driver, no context, or no kernel for this GPU.
void load_cuda_kernels();

// Enqueues the launches on a stream of the current context: no synchronization, no allocation.
void launch_cuda(const std::vector<CudaLaunch>& launches, CUstream_st* stream);

// Runs one node with tensors in host memory on the GPU of the current context, or on the first one where none is
// current: allocates, copies, waits. For tests of the kernels.
void run_on_gpu(const Definition& definition, const Attributes& attributes, const std::vector<Tensor>& inputs,
                const std::vector<Tensor>& outputs, int tactic);

}  // namespace d2d
