// The scheduler of the emulated block: fibers, barriers, warp shuffles, and the bookkeeping of shared memory.
#include "emulator.h"

#include <algorithm>
#include <memory>
#include <random>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace gpu {
namespace host {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedLimit = 48 << 10;  // what every GPU gives a block without asking
constexpr int kWarp = 32;

enum class State { ready, in_shuffle, at_barrier, done };

struct Fiber {
    int id = 0;
    State state = State::ready;
    Place place{"", 0};
    int value = 0;  // handed into a shuffle, and what came out
    int mask = 0;
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

struct Block {
    const Grid* grid;
    unsigned x, y;
    std::vector<Fiber> fibers;
    std::map<std::string, Array> arrays;
    size_t shared_bytes = 0;
    unsigned epoch = 1;  // barriers passed
    Fiber* running = nullptr;
    Entry entry;
    const uint64_t* words;
    std::string mistake;
#if defined(__x86_64__)
    void* scheduler = nullptr;
#else
    ucontext_t scheduler;
#endif
};

thread_local Block* block = nullptr;

struct Stop {};  // unwinds a fiber after a mistake

[[noreturn]] void mistake(const std::string& what, Place place) {
    if (block->mistake.empty())
        block->mistake = std::string(place.file) + ":" + std::to_string(place.line) + ": thread " +
                         std::to_string(block->running->id) + " of block (" + std::to_string(block->x) +
                         ", " + std::to_string(block->y) + ") " + what;
    throw Stop{};
}

void body() {
    try {
        block->entry(block->words);
    } catch (const Stop&) {
    } catch (const std::exception& error) {
        if (block->mistake.empty()) block->mistake = error.what();
    }
    block->running->state = State::done;
}

#if defined(__x86_64__)
// Saves the registers that a called function must keep on the stack, stores the stack pointer, loads the
// other one's.
extern "C" void d2d_switch_fiber(void** save, void* load);
__asm__(R"(
.text
.globl d2d_switch_fiber
.hidden d2d_switch_fiber
d2d_switch_fiber:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

void leave() { d2d_switch_fiber(&block->running->stack_pointer, block->scheduler); }

void first_entry() {
    body();
    leave();
}

void prepare(Fiber& fiber, unsigned char* stack) {
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes) / 64 * 64);
    *--top = nullptr;  // keeps the stack aligned as a call would
    *--top = reinterpret_cast<void*>(first_entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
}

void enter(Fiber& fiber) {
    block->running = &fiber;
    d2d_switch_fiber(&block->scheduler, fiber.stack_pointer);
}
#else
void leave() { swapcontext(&block->running->context, &block->scheduler); }

void first_entry() {
    body();
    leave();
}

void prepare(Fiber& fiber, unsigned char* stack) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, first_entry, 0);
}

void enter(Fiber& fiber) {
    block->running = &fiber;
    swapcontext(&block->scheduler, &fiber.context);
}
#endif

void wait(State state) {
    block->running->state = state;
    leave();
    if (!block->mistake.empty()) throw Stop{};
}

void run_fibers(std::mt19937& random) {
    std::vector<Fiber*> order;
    for (Fiber& fiber : block->fibers) order.push_back(&fiber);
    for (bool progress = true; progress;) {
        progress = false;
        if (block->grid->seed) std::shuffle(order.begin(), order.end(), random);
        for (Fiber* fiber : order) {
            const bool unwinds = !block->mistake.empty() && fiber->state != State::done;
            if (fiber->state != State::ready && !unwinds) continue;
            enter(*fiber);
            progress = true;
        }
    }
    for (Fiber& fiber : block->fibers) {
        if (fiber.state == State::done) continue;
        if (block->mistake.empty())
            block->mistake = std::string(fiber.place.file) + ":" + std::to_string(fiber.place.line) +
                             ": thread " + std::to_string(fiber.id) +
                             " waits for ever for threads that have left or wait elsewhere";
        enter(fiber);  // unwinds
    }
}

}  // namespace

std::map<std::string, Entry>& entries() {
    static std::map<std::string, Entry> all;
    return all;
}

void launch(const std::string& name, const Grid& grid, const std::vector<uint64_t>& words) {
    const auto found = entries().find(name);
    if (found == entries().end()) throw std::runtime_error("there is no kernel " + name);
    const unsigned threads = grid.block[0];
    if (threads % kWarp || grid.block[1] != 1 || grid.block[2] != 1 || grid.grid[2] != 1)
        throw std::runtime_error(name + ": blocks are one-dimensional, of whole warps");
    std::mt19937 random(grid.seed);
    const std::unique_ptr<unsigned char[]> stacks(new unsigned char[kStackBytes * threads]);
    for (unsigned y = 0; y < grid.grid[1]; ++y)
        for (unsigned x = 0; x < grid.grid[0]; ++x) {
            Block state{};
            state.grid = &grid;
            state.x = x;
            state.y = y;
            state.entry = found->second;
            state.words = words.data();
            state.epoch = 1;
            state.fibers.resize(threads);
            block = &state;
            for (unsigned i = 0; i < threads; ++i) {
                state.fibers[i].id = static_cast<int>(i);
                prepare(state.fibers[i], stacks.get() + kStackBytes * i);
            }
            run_fibers(random);
            block = nullptr;
            if (!state.mistake.empty()) throw std::runtime_error(name + ": " + state.mistake);
        }
}

size_t dynamic_bytes() { return block->grid->shared_bytes; }

Array& shared_array(const std::string& name, size_t count, size_t size, Place place) {
    const auto found = block->arrays.find(name);
    if (found != block->arrays.end()) return found->second;
    block->shared_bytes += count * size;
    if (block->shared_bytes > kSharedLimit) mistake("asks for more than 48 KiB of shared memory", place);
    Array& array = block->arrays[name];
    array.bytes.assign(count * size, 0xCD);
    array.touched.resize(count);
    return array;
}

void check_access(Array& array, int64_t index, size_t count, bool write, Place place) {
    if (index < 0 || static_cast<size_t>(index) >= count)
        mistake("touches element " + std::to_string(index) + " of a shared array of " + std::to_string(count),
                place);
    Touched& touched = array.touched[index];
    const int me = block->running->id;
    const unsigned now = block->epoch;
    const bool others_wrote = touched.writer != -1 && touched.writer != me && touched.write_epoch == now;
    const bool others_read = touched.reader != -1 && touched.reader != me && touched.read_epoch == now;
    if (!write && !touched.written) mistake("reads shared memory that nobody wrote", place);
    if (others_wrote)
        mistake("races with a write by thread " + std::to_string(touched.writer) + " (a barrier is missing)",
                place);
    if (write && others_read)
        mistake("overwrites what another thread may still read (a barrier is missing)", place);
    if (write) {
        touched.written = true;
        touched.writer = me;
        touched.write_epoch = now;
    } else {
        touched.reader = others_read ? -2 : me;
        touched.read_epoch = now;
    }
}

}  // namespace host

using host::block;
using host::State;

int64_t thread() { return block->running->id; }
int64_t threads() { return static_cast<int64_t>(block->fibers.size()); }
int64_t block_x() { return block->x; }
int64_t block_y() { return block->y; }
int64_t blocks_y() { return block->grid->grid[1]; }

void sync_block(const char* file, int line) {
    const host::Place place{file, line};
    block->running->place = place;
    block->running->state = State::at_barrier;
    for (const host::Fiber& fiber : block->fibers)
        if (fiber.state != State::at_barrier) return host::wait(State::at_barrier);
    for (const host::Fiber& fiber : block->fibers)
        if (fiber.place.line != place.line) host::mistake("and others wait at different barriers", place);
    ++block->epoch;
    for (host::Fiber& fiber : block->fibers) fiber.state = State::ready;
}

int shuffle_xor(int value, int mask, const char* file, int line) {
    const host::Place place{file, line};
    host::Fiber& me = *block->running;
    me.place = place;
    me.value = value;
    me.mask = mask;
    me.state = State::in_shuffle;
    host::Fiber* lanes = &block->fibers[me.id / host::kWarp * host::kWarp];
    for (int i = 0; i < host::kWarp; ++i)
        if (lanes[i].state != State::in_shuffle) {
            host::wait(State::in_shuffle);
            return me.value;
        }
    int taken[host::kWarp];
    for (int i = 0; i < host::kWarp; ++i) {
        if (lanes[i].place.line != place.line || lanes[i].mask != mask)
            host::mistake("and others of its warp wait in different shuffles", place);
        taken[i] = lanes[i ^ mask].value;
    }
    for (int i = 0; i < host::kWarp; ++i) {
        lanes[i].value = taken[i];
        lanes[i].state = State::ready;
    }
    return me.value;
}

}  // namespace gpu
