// The running block, as the emulator's own files see it: fibers, what is in flight, and how the threads of a warp meet.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace gpu {
namespace host {

constexpr int kWarp = 32;

enum class State { ready, in_warp, at_barrier, done };

struct Copy {
    Array* array;
    int64_t index;
    unsigned char data[16];
};

struct Product;  // of a warpgroup, under way
struct Registers;

// A thread's share of a product.
struct Share {
    std::shared_ptr<Product> product;
    int* sums;
    Registers* of_sums;
    Registers* of_rows;
};

struct Fiber {
    int id = 0;
    State state = State::ready;
    Place place{"", 0};
    const void* in = nullptr;  // handed into a warp operation
    void* out = nullptr;
    std::vector<Copy> open;                 // issued since the last commit
    std::vector<std::vector<Copy>> groups;  // committed, not waited for
    std::vector<Share> open_products;
    std::vector<std::vector<Share>> product_groups;
    unsigned register_fences = 0;        // wgmma_fence's passed
    std::vector<unsigned> proxy_fences;  // the epoch of each fence_async_proxy
    unsigned char* stack = nullptr;
    void* sanitizers = nullptr;  // what the address sanitizer keeps of a stack that is left
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

// Who changed an element of global memory last, and how: other blocks must leave it or add as well, other threads of the
// block until a barrier.
struct Changed {
    uint64_t block;
    int thread;
    unsigned epoch;
    Access access;
};
using Changes = std::unordered_map<uintptr_t, Changed>;

struct Block {
    const Grid* grid;
    Changes* changes;  // of the launch
    unsigned x, y, z;
    std::vector<Fiber> fibers;
    std::map<std::string, Array> arrays;
    size_t shared_bytes = 0;
    size_t next_address = 1024;  // of a shared array; what lies before is the driver's
    unsigned epoch = 1;          // barriers passed
    Fiber* running = nullptr;
    Entry entry;
    const uint64_t* words;
    std::string mistake;
    const void* scheduler_stack = nullptr;
    size_t scheduler_bytes = 0;
    void* sanitizers = nullptr;
#if defined(__x86_64__)
    void* scheduler = nullptr;
#else
    ucontext_t scheduler;
#endif
};

extern thread_local Block* block;

// Ends the launch with the first mistake.
[[noreturn]] void mistake(const std::string& what, Place place);

// Leaves the running fiber until somebody sets its state to ready.
void wait(State state);

// All threads of a warp, or of `size` from a multiple of it, hand in `in`; the last one to arrive does the work, which fills
// every thread's `out`.
template <class Work>
void together(int size, const void* in, void* out, Place place, const Work& work) {
    Fiber& me = *block->running;
    me.place = place;
    me.in = in;
    me.out = out;
    me.state = State::in_warp;
    Fiber* threads = &block->fibers[me.id / size * size];
    for (int i = 0; i < size; ++i)
        if (threads[i].state != State::in_warp) return wait(State::in_warp);
    for (int i = 0; i < size; ++i)
        if (threads[i].place.line != place.line)
            mistake("and others of its warp wait in different warp operations", place);
    work(threads);
    for (int i = 0; i < size; ++i) threads[i].state = State::ready;
}

}  // namespace host
}  // namespace gpu
