// CUDA on the CPU, for proofs and not for speed: one fiber a thread, blocks one after another.
//
// A launch stops at the first mistake and names its place: a read of shared memory that nobody wrote, an
// access out of an array or out of the tensors of the launch, two threads that touch one element without a barrier
// between them (one of them writing), two blocks, or threads without a barrier, that touch one
// element of a tensor (one of them storing), a read of what an asynchronous copy has not brought yet, threads that wait at
// different barriers or warp operations, a barrier that some thread never reaches. An asynchronous copy is as late
// as the rules allow: its element holds poison until the wait that covers it.
// Races are found in any order of execution, since each element remembers who touched it since the last
// barrier; the order of the threads is shuffled all the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "float16.h"

namespace gpu {
namespace host {

using Entry = void (*)(const uint64_t* words);

// Kernels by name; each GPU_KERNEL adds itself.
std::map<std::string, Entry>& entries();

struct Range {
    const void* begin;
    size_t bytes;
};

struct Grid {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    unsigned seed = 0;          // of the order in which threads run; 0: ascending
    std::vector<Range> memory;  // the tensors of the launch
};

// Runs a kernel; throws std::runtime_error with the first mistake.
void launch(const std::string& name, const Grid& grid, const std::vector<uint64_t>& words);

// Of the GPU that is played, in tenths: $D2D_HOST_CAPABILITY, or 80.
int capability();

// Names of the kernels that this process did not launch, separated by blanks.
std::string never_launched();

struct Place {
    const char* file;
    int line;
};

// Who touched a word of shared memory since the last barrier; -1: nobody, -2: several threads.
struct Touched {
    bool written = false;
    bool in_flight = false;  // an asynchronous copy was issued and not waited for
    int writer = -1;
    int reader = -1;
    unsigned write_epoch = 0;
    unsigned read_epoch = 0;
    unsigned fences = 0;    // fence_async_proxy's that the writer had passed
    unsigned products = 0;  // under way that read it: wgmma
};

struct Array {
    std::vector<unsigned char> bytes;
    std::vector<Touched> touched;  // a word each, or an element where those are smaller
    size_t grain;                  // bytes of that
    size_t address;                // in the block's shared memory
};

constexpr const char* kDynamic = "dynamic";  // the name of dynamic_shared's array

// The array of that name and type in the running block; made, filled with poison, by the first thread that
// asks.
Array& shared_array(const std::string& name, size_t count, size_t size, Place place);
// Element `index` of the array seen as one of elements of `size` bytes.
void check_access(Array& array, int64_t index, size_t size, bool write, Place place);
size_t dynamic_bytes();
enum class Access { load, add, store };
// Of global memory: aligned, within one tensor of the launch, and in no conflict with another block.
void check_global(const void* address, size_t bytes, Access access, Place place);
void copy_async(Array& array, int64_t index, const void* from, bool valid, Place place);
void copy_async_wait(int left, Place place);

template <class... A, size_t... I>
void call(void (*kernel)(A...), const uint64_t* words, std::index_sequence<I...>) {
    static_assert(((sizeof(A) == 8) && ...), "kernel parameters are 8 bytes wide");
    kernel((A)(words[I])...);
}

template <auto kernel, class... A>
void entry_of(void (*)(A...), const uint64_t* words) {
    call(kernel, words, std::index_sequence_for<A...>());
}

template <auto kernel>
bool add(const char* name) {
    entries()[name] = [](const uint64_t* words) { entry_of<kernel>(kernel, words); };
    return true;
}

}  // namespace host

// Two parameters and not one Place: in braces, compilers take the place of this declaration for the caller's.
#define GPU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

#define GPU_DEVICE inline

#define GPU_KERNEL(name, ...)                                     \
    static void name(__VA_ARGS__);                                \
    static const bool name##_added = gpu::host::add<name>(#name); \
    static void name(__VA_ARGS__)

#define GPU_KERNEL_OF(threads, blocks, name, ...) GPU_KERNEL(name, __VA_ARGS__)

#define GPU_SHARED(T, name, count) const gpu::Shared<T> name = gpu::shared<T>(#name, count)

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
    host::Array* array;

    T load(int64_t i, GPU_HERE) const { return load_part<T>(i, file, line); }
    void store(int64_t i, T value, GPU_HERE) const { store_part<T>(i, value, file, line); }
    template <class Part>
    Part load_part(int64_t i, GPU_HERE) const {
        host::check_access(*array, i, sizeof(Part), false, {file, line});
        Part part;
        std::memcpy(&part, array->bytes.data() + i * sizeof(Part), sizeof(Part));
        return part;
    }
    template <class Part>
    void store_part(int64_t i, Part value, GPU_HERE) const {
        host::check_access(*array, i, sizeof(Part), true, {file, line});
        std::memcpy(array->bytes.data() + i * sizeof(Part), &value, sizeof(Part));
    }
};

template <class T>
Shared<T> shared(const char* name, size_t count, GPU_HERE) {
    return {&host::shared_array(name, count, sizeof(T), host::Place{file, line})};
}

template <class T>
Shared<T> dynamic_shared(int64_t count, GPU_HERE) {
    if (count * sizeof(T) > host::dynamic_bytes())
        throw std::runtime_error("more dynamic shared memory than the launch asked for");
    return {&host::shared_array(host::kDynamic, count, sizeof(T), host::Place{file, line})};
}

int64_t thread();
int64_t threads();
int64_t block_x();
int64_t block_y();
int64_t blocks_y();
int64_t block_z();
int64_t blocks_z();
void sync_block(GPU_HERE);
int shuffle_xor(int value, int mask, GPU_HERE);

inline int bits_of(float value) {
    int bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float float_of(int bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float shuffle_xor(float value, int mask, GPU_HERE) {
    return float_of(shuffle_xor(bits_of(value), mask, file, line));
}
inline double shuffle_xor(double value, int mask, GPU_HERE) {
    int halves[2];
    std::memcpy(halves, &value, 8);
    for (int& half : halves) half = shuffle_xor(half, mask, file, line);
    std::memcpy(&value, halves, 8);
    return value;
}

template <class T>
T load(const T* from, GPU_HERE) {
    host::check_global(from, sizeof(T), host::Access::load, {file, line});
    return *from;
}
template <class T>
T load_once(const T* from, GPU_HERE) {
    return load(from, file, line);
}
template <class T>
void store(T* to, T value, GPU_HERE) {
    host::check_global(to, sizeof(T), host::Access::store, {file, line});
    *to = value;
}
inline void add(int* to, int value, GPU_HERE) {
    host::check_global(to, sizeof(int), host::Access::add, {file, line});
    *to += value;
}

inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

inline void copy_async(const Shared<Vec16>& to, int64_t i, const void* from, bool valid, GPU_HERE) {
    host::copy_async(*to.array, i, from, valid, {file, line});
}
void copy_async_commit();
template <int left>
void copy_async_wait(GPU_HERE) {
    host::copy_async_wait(left, {file, line});
}
void ldmatrix_x4(uint32_t (&r)[4], const Shared<Vec16>& from, int64_t i, GPU_HERE);
void mma_16_8_32(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, GPU_HERE);
void mma_16_8_64(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, GPU_HERE);
inline bool has_int4_tensor_cores() { return host::capability() < 90; }

}  // namespace gpu
