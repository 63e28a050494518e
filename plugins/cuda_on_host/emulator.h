// CUDA on the CPU, for proofs and not for speed: one fiber a thread, blocks one after another.
//
// A launch stops at the first mistake and names its place: a read of shared memory that nobody wrote, an
// access out of an array, two threads that touch one element without a barrier between them (one of them
// writing), threads that wait at different barriers or shuffles, a barrier that some thread never reaches.
// Races are found in any order of execution, since each element remembers who touched it since the last
// barrier; the order of the threads is shuffled all the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace gpu {
namespace host {

using Entry = void (*)(const uint64_t* words);

// Kernels by name; each GPU_KERNEL adds itself.
std::map<std::string, Entry>& entries();

struct Grid {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    unsigned seed = 0;  // of the order in which threads run; 0: ascending
};

// Runs a kernel; throws std::runtime_error with the first mistake.
void launch(const std::string& name, const Grid& grid, const std::vector<uint64_t>& words);

struct Place {
    const char* file;
    int line;
};

// Who touched an element of shared memory since the last barrier; -1: nobody, -2: several threads.
struct Touched {
    bool written = false;
    int writer = -1;
    int reader = -1;
    unsigned write_epoch = 0;
    unsigned read_epoch = 0;
};

struct Array {
    std::vector<unsigned char> bytes;
    std::vector<Touched> touched;
};

// The array of that name and type in the running block; made, filled with poison, by the first thread that
// asks.
Array& shared_array(const std::string& name, size_t count, size_t size, Place place);
void check_access(Array& array, int64_t index, size_t count, bool write, Place place);
size_t dynamic_bytes();

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

#define GPU_SHARED(T, name, count) const gpu::Shared<T> name = gpu::shared<T>(#name, count)

template <class T>
struct Shared {
    host::Array* array;
    size_t count;

    T load(int64_t i, GPU_HERE) const {
        host::check_access(*array, i, count, false, {file, line});
        return reinterpret_cast<const T*>(array->bytes.data())[i];
    }
    void store(int64_t i, T value, GPU_HERE) const {
        host::check_access(*array, i, count, true, {file, line});
        reinterpret_cast<T*>(array->bytes.data())[i] = value;
    }
};

template <class T>
Shared<T> shared(const char* name, size_t count, GPU_HERE) {
    return {&host::shared_array(name, count, sizeof(T), host::Place{file, line}), count};
}

template <class T>
Shared<T> dynamic_shared(int64_t count, GPU_HERE) {
    if (count * sizeof(T) > host::dynamic_bytes())
        throw std::runtime_error("more dynamic shared memory than the launch asked for");
    return {&host::shared_array("dynamic", count, sizeof(T), host::Place{file, line}),
            static_cast<size_t>(count)};
}

int64_t thread();
int64_t threads();
int64_t block_x();
int64_t block_y();
int64_t blocks_y();
void sync_block(GPU_HERE);
int shuffle_xor(int value, int mask, GPU_HERE);

}  // namespace gpu
