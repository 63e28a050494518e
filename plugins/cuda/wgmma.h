// wgmma of SM 9.0a: products of a warpgroup, four warps in a row from a multiple of four, on tensor cores that work while
// the warps go on. D += A B with A, 64 rows and 32 k's of int8, in registers, B, N columns, in shared memory, D in registers.
//
// Fragments of warp w of the warpgroup, g = lane / 4, t = lane % 4, register r, byte e:
//   WgmmaRows   A: row 16 w + g + 8 (r % 2), k 4 t + e + 16 (r / 2), that of mma_16_8_32 for the warp's 16 rows
//   WgmmaSums   D: row 16 w + g + 8 (r / 2 % 2), column 8 (r / 4) + 2 t + r % 2
// B lies in rows of 64 bytes, row n column n of B, piece c (16 bytes) of row n at piece c XOR (n / 2 % 4), from a multiple of
// 512 bytes: the descriptor's mode of 64 bytes.
//
// Order, as the PTX ISA wants it (the emulator reports what breaks it):
//   shared memory   every thread that wrote calls fence_async_proxy, after its copies have arrived, then a barrier; the
//                   memory is free for other writes once all threads have waited for the product, and a barrier
//   registers       wgmma_fence after registers of A or D were written and before wgmma reads them; after it nobody touches
//                   them until the wait that covers it. Products into the same sums follow one another by themselves.
#pragma once

#include "gpu.h"

#if defined(__CUDACC_RTC__)

namespace gpu {

class WgmmaRows {
  public:
    __device__ void set(int r, uint32_t bytes) { word[r] = bytes; }
    uint32_t word[4];
};

template <int N>
class WgmmaSums {
  public:
    __device__ int at(int r) const { return sum[r]; }
    int sum[N / 2] = {};
};

// Of the matrix that begins at element i; of one that begins e elements later: plus e.
__device__ inline uint64_t wgmma_descriptor(const Shared<Vec16>& memory, int64_t i) {
    constexpr uint64_t swizzle_64 = 2, eight_rows = 8 * 64;
    return swizzle_64 << 62 | (eight_rows >> 4) << 32 | (shared_address(memory.memory + i) & 0x3FFFF) >> 4;
}

__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of products.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all groups but the last `left`.
template <int left>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}

#define D4(i) "+r"(d.sum[i]), "+r"(d.sum[i + 1]), "+r"(d.sum[i + 2]), "+r"(d.sum[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
__device__ inline void wgmma(WgmmaSums<128>& d, const WgmmaRows& a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1;"
        : D16(0), D16(16), D16(32), D16(48)
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "l"(b));
}
#undef D16
#undef D4

}  // namespace gpu

#else

#include "wgmma_on_host.h"

#endif
