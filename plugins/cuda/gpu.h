// What a kernel source may use of the GPU: thin wrappers under NVRTC, an emulator under any other C++
// compiler.
//
// Rules that keep one source right on both: shared memory only through gpu::Shared (on the host its accesses
// are checked for bounds, races and values that nobody wrote), barriers and shuffles only through the
// functions below, 64-bit kernel parameters (pointers and long long), one GPU_KERNEL per entry.
#pragma once

#include "integers.h"

#if defined(__CUDACC_RTC__)

#define GPU_DEVICE __device__ inline
#define GPU_KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)
#define GPU_SHARED(T, name, count)     \
    __shared__ T name##_memory[count]; \
    const gpu::Shared<T> name { name##_memory }

namespace gpu {

template <class T>
struct Shared {
    T* memory;
    __device__ T load(int64_t i) const { return memory[i]; }
    __device__ void store(int64_t i, T value) const { memory[i] = value; }
};

template <class T>
__device__ Shared<T> dynamic_shared(int64_t) {
    extern __shared__ __align__(16) unsigned char gpu_dynamic_memory[];
    return {reinterpret_cast<T*>(gpu_dynamic_memory)};
}

__device__ inline int64_t thread() { return threadIdx.x; }
__device__ inline int64_t threads() { return blockDim.x; }
__device__ inline int64_t block_x() { return blockIdx.x; }
__device__ inline int64_t block_y() { return blockIdx.y; }
__device__ inline int64_t blocks_y() { return gridDim.y; }
__device__ inline void sync_block() { __syncthreads(); }
__device__ inline int shuffle_xor(int value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

}  // namespace gpu

#else

#include "emulator.h"

#endif
