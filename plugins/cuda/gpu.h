// What a kernel source may use of the GPU: thin wrappers under NVRTC, an emulator under any other C++
// compiler.
//
// Rules that keep one source right on both: shared memory only through gpu::Shared (on the host its accesses
// are checked for bounds, races and values that nobody wrote), barriers, warp operations and asynchronous copies
// only through the functions below, 64-bit kernel parameters (pointers and long long), one GPU_KERNEL per entry.
// Half precision is bits in integers (elements.h reads and writes them). Global memory through gpu::load, gpu::store and gpu::add where the host shall check that it belongs to a tensor, and
// that no two blocks of a launch touch an element one of them stores.
//
// Fragments of the warp operations, g = lane / 4, t = lane % 4, register r, byte e:
//   mma_16_8_32   A: row g + 8 (r % 2), k 4 t + e + 16 (r / 2)   B: column g, k 4 t + e + 16 r
//                 D: row g + 8 (r / 2), column 2 t + r % 2        D += A B, int8 into int32
//   mma_16_8_64   the same for int4, nibble e of 8, low ones first, not on 9.0 and later, which have no int4 tensor cores:
//                 A: row g + 8 (r % 2), k 8 t + e + 32 (r / 2)   B: column g, k 8 t + e + 32 r
//   ldmatrix_x4   lane 8 i + j names row j of matrix i (16 bytes); r[i] receives bytes 4 t .. 4 t + 3 of row g of it
#pragma once

#include "integers.h"

#if defined(__CUDACC_RTC__)

#if __CUDA_ARCH__ >= 800
#define GPU_ROUNDS_TO_BFLOAT16
#endif
#define GPU_DEVICE __device__ inline
#define GPU_KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)
// With the threads of a block, and how many blocks an SM shall hold at once.
#define GPU_KERNEL_OF(threads, blocks, name, ...) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
#define GPU_SHARED(T, name, count)     \
    __shared__ T name##_memory[count]; \
    const gpu::Shared<T> name { name##_memory }

namespace gpu {

struct alignas(8) Vec8 {
    uint32_t x, y;
};
struct alignas(16) Vec16 {
    uint32_t x, y, z, w;
};
struct alignas(8) Float2 {
    float x, y;
};
struct alignas(16) Float4 {
    float x, y, z, w;
};

template <class T>
struct Shared {
    T* memory;
    __device__ T load(int64_t i) const { return memory[i]; }
    __device__ void store(int64_t i, T value) const { memory[i] = value; }
    // Part i of the same memory seen as an array of smaller elements.
    template <class Part>
    __device__ Part load_part(int64_t i) const {
        return reinterpret_cast<const Part*>(memory)[i];
    }
    template <class Part>
    __device__ void store_part(int64_t i, Part value) const {
        reinterpret_cast<Part*>(memory)[i] = value;
    }
};

template <class T>
__device__ Shared<T> dynamic_shared(int64_t) {
    extern __shared__ __align__(1024) unsigned char gpu_dynamic_memory[];  // as wgmma's swizzles want it
    return {reinterpret_cast<T*>(gpu_dynamic_memory)};
}

__device__ inline int64_t thread() { return threadIdx.x; }
__device__ inline int64_t threads() { return blockDim.x; }
__device__ inline int64_t block_x() { return blockIdx.x; }
__device__ inline int64_t block_y() { return blockIdx.y; }
__device__ inline int64_t blocks_y() { return gridDim.y; }
__device__ inline int64_t block_z() { return blockIdx.z; }
__device__ inline int64_t blocks_z() { return gridDim.z; }
__device__ inline void sync_block() { __syncthreads(); }
__device__ inline int bits_of(float value) { return __float_as_int(value); }
__device__ inline float float_of(int bits) { return __int_as_float(bits); }
// T: int, float or double.
template <class T>
__device__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(~0u, value, mask);
}

template <class T>
__device__ T load(const T* from) {
    return *from;
}
template <class T>
__device__ void store(T* to, T value) {
    *to = value;
}
// What several blocks of a launch may do to one element; the order is open.
__device__ inline void add(int* to, int value) { atomicAdd(to, value); }
// Memory that is read once and never written: past the first-level cache.
__device__ inline Vec16 load_once(const Vec16* from) {
    Vec16 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from));
    return v;
}
__device__ inline Vec8 load_once(const Vec8* from) {
    Vec8 v;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}

// A float16 as the bits that it is, and two floats rounded to nearest even, the first in the low half.
__device__ inline float of_float16(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ inline uint32_t to_float16(float low, float high) {
    uint32_t pair;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
        : "=r"(pair)
        : "f"(low), "f"(high));
#endif
    return pair;
}
#ifdef GPU_ROUNDS_TO_BFLOAT16
__device__ inline uint32_t to_bfloat16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

__device__ inline float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

__device__ inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes of global memory into element i, or zeros where not `valid`; they are there after the wait that
// covers them. Before SM 8.0 at once.
__device__ inline void copy_async(const Shared<Vec16>& to, int64_t i, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to.memory + i)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
#else
    to.memory[i] = valid ? *static_cast<const Vec16*>(from) : Vec16{0, 0, 0, 0};
#endif
}
// Closes a group of this thread's copies.
__device__ inline void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all of this thread's groups but the last `left`.
template <int left>
__device__ inline void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#endif
}

__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const Shared<Vec16>& from, int64_t i) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(from.memory + i))
                 : "memory");
}

#if __CUDA_ARCH__ < 800
__device__ inline void mma_8_8_16(int& d0, int& d1, uint32_t a, uint32_t b) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(d0), "+r"(d1)
        : "r"(a), "r"(b));
}
__device__ inline void mma_8_8_32(int& d0, int& d1, uint32_t a, uint32_t b) {
    asm("mma.sync.aligned.m8n8k32.row.col.s32.s4.s4.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(d0), "+r"(d1)
        : "r"(a), "r"(b));
}
#endif

__device__ inline void mma_16_8_32(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    // Two halves of the rows, two of k: the registers hold the same elements.
    mma_8_8_16(d[0], d[1], a[0], b0);
    mma_8_8_16(d[0], d[1], a[2], b1);
    mma_8_8_16(d[2], d[3], a[1], b0);
    mma_8_8_16(d[2], d[3], a[3], b1);
#endif
}

// Where they are not, mma_16_8_64 is slow, not wrong.
__device__ constexpr bool has_int4_tensor_cores() { return __CUDA_ARCH__ < 900; }

__device__ inline void mma_16_8_64(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    mma_8_8_32(d[0], d[1], a[0], b0);
    mma_8_8_32(d[0], d[1], a[2], b1);
    mma_8_8_32(d[2], d[3], a[1], b0);
    mma_8_8_32(d[2], d[3], a[3], b1);
#endif
}

}  // namespace gpu

#else

#include "emulator.h"

#endif
