// Memory of one thread that kernels use while a task runs: grows, is never given back, costs no allocation
// after that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace d2d {

class Scratch {
  public:
    ~Scratch() { std::free(data_); }

    void* bytes(size_t count) {
        if (count > size_) {
            std::free(data_);
            size_ = (count + 4095) / 4096 * 4096;
            data_ = std::aligned_alloc(64, size_);
            if (!data_) {
                size_ = 0;
                throw std::bad_alloc();
            }
        }
        return data_;
    }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

// 64-byte aligned, at least `count` values of the calling thread; a `Slot` tells apart buffers that live side
// by side.
template <class T, int Slot = 0>
T* scratch(size_t count) {
    thread_local Scratch memory;
    return static_cast<T*>(memory.bytes(count * sizeof(T)));
}

}  // namespace d2d
