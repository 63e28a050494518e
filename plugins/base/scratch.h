// Memory of one thread that kernels use while a task runs: grows, is never given back, costs no allocation
// after that.
#pragma once

#include <cstddef>

namespace d2d {

// At least `bytes` bytes of the calling thread, 64-byte aligned; slots 0 .. 3 are buffers that live side by
// side.
void* scratch_bytes(int slot, size_t bytes);

template <class T>
T* scratch(size_t count, int slot = 0) {
    return static_cast<T*>(scratch_bytes(slot, count * sizeof(T)));
}

}  // namespace d2d
