// wgmma on the emulator, by the PTX ISA: asynchronous, as late as the rules allow, and strict about them.
//
// A product's sums arrive at the wait that covers it. Until then its warpgroup must leave the registers of A and D, and all
// threads the shared memory of B: whoever touches them is reported. So are registers written and not fenced before wgmma
// reads them, shared memory written and not fenced for it, descriptors that differ within a warpgroup, and warps that do
// something else meanwhile.
#pragma once

#include "emulator.h"

namespace gpu {
namespace host {

// Of a thread, A or D: who may touch them.
struct Registers {
    Registers();
    ~Registers() noexcept(false);
    Registers(const Registers&) = delete;
    Registers& operator=(const Registers&) = delete;

    int products = 0;  // under way
    unsigned fences;   // wgmma_fence's that the thread had passed when it wrote them last
};

void check_registers(const Registers& registers, const char* what, Place place);
void write_registers(Registers& registers, Place place);
uint64_t shared_address(const Array& array, int64_t byte);
// D += A B; `sums` N / 2 values of the thread, `rows` its 4 words.
void wgmma(int n, int* sums, Registers& of_sums, const uint32_t* rows, Registers& of_rows,
           uint64_t descriptor, Place place);
void wgmma_wait(int left, Place place);

}  // namespace host

class WgmmaRows {
  public:
    void set(int r, uint32_t bytes, GPU_HERE) {
        host::write_registers(registers, {file, line});
        word[r] = bytes;
    }

    host::Registers registers;
    uint32_t word[4] = {};
};

template <int N>
class WgmmaSums {
  public:
    int at(int r, GPU_HERE) const {
        host::check_registers(registers, "reads sums", {file, line});
        return sum[r];
    }

    host::Registers registers;
    int sum[N / 2] = {};
};

inline uint64_t wgmma_descriptor(const Shared<Vec16>& memory, int64_t i) {
    constexpr uint64_t swizzle_64 = 2, eight_rows = 8 * 64;
    return swizzle_64 << 62 | (eight_rows >> 4) << 32 | host::shared_address(*memory.array, 16 * i) >> 4;
}

void fence_async_proxy();
void wgmma_fence(GPU_HERE);
void wgmma_commit(GPU_HERE);
template <int left>
void wgmma_wait(GPU_HERE) {
    host::wgmma_wait(left, {file, line});
}
template <int N>
void wgmma(WgmmaSums<N>& d, WgmmaRows& a, uint64_t b, GPU_HERE) {
    static_assert(N == 8 || N == 24 || (N % 16 == 0 && N <= 256), "wgmma of int8 has no such shape");
    host::wgmma(N, d.sum, d.registers, a.word, a.registers, b, {file, line});
}

}  // namespace gpu
