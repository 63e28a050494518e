// Not in the header: what files with different instruction set flags share must be compiled once, without
// any.
#include "scratch.h"

#include <cstdlib>
#include <new>

namespace d2d {
namespace {

struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
};

}  // namespace

void* scratch_bytes(int slot, size_t bytes) {
    thread_local Buffer buffers[4];
    Buffer& buffer = buffers[slot];
    if (bytes > buffer.size) {
        std::free(buffer.data);
        buffer.size = (bytes + 4095) / 4096 * 4096;
        buffer.data = std::aligned_alloc(64, buffer.size);
        if (!buffer.data) {
            buffer.size = 0;
            throw std::bad_alloc();
        }
    }
    return buffer.data;
}

}  // namespace d2d
