// The scheduler of the emulated block: fibers, barriers, warp operations, asynchronous copies, and the bookkeeping
// of shared memory.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>
#include <set>

#include "block.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace gpu {
namespace host {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedLimit = 48 << 10;  // what every GPU gives a block without asking

struct Stop {};  // unwinds a fiber after a mistake

}  // namespace

thread_local Block* block = nullptr;

void mistake(const std::string& what, Place place) {
    if (block->mistake.empty())
        block->mistake = std::string(place.file) + ":" + std::to_string(place.line) + ": thread " +
                         std::to_string(block->running->id) + " of block (" + std::to_string(block->x) +
                         ", " + std::to_string(block->y) + (block->z ? ", " + std::to_string(block->z) : "") +
                         ") " + what;
    throw Stop{};
}

namespace {

// The address sanitizer must know which stack is in use.
#if defined(__SANITIZE_ADDRESS__)
void leaves(void** keep, const void* to, size_t bytes) { __sanitizer_start_switch_fiber(keep, to, bytes); }
void is_back(void* kept, const void** from, size_t* bytes) {
    __sanitizer_finish_switch_fiber(kept, from, bytes);
}
#else
void leaves(void**, const void*, size_t) {}
void is_back(void*, const void**, size_t*) {}
#endif

void body() {
    try {
        block->entry(block->words);
        for (const auto& group : block->running->groups)
            if (!group.empty())
                mistake("ends with a copy_async that was not waited for", block->running->place);
        if (!block->running->open.empty())
            mistake("ends with a copy_async that was not committed", block->running->place);
        if (!block->running->product_groups.empty() || !block->running->open_products.empty())
            mistake("ends with a wgmma that was not waited for", block->running->place);
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

void switch_to_scheduler() { d2d_switch_fiber(&block->running->stack_pointer, block->scheduler); }
void switch_to(Fiber& fiber) { d2d_switch_fiber(&block->scheduler, fiber.stack_pointer); }
void first_entry();

void prepare(Fiber& fiber, unsigned char* stack) {
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes) / 64 * 64);
    *--top = nullptr;  // keeps the stack aligned as a call would
    *--top = reinterpret_cast<void*>(first_entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
}

#else
void switch_to_scheduler() { swapcontext(&block->running->context, &block->scheduler); }
void switch_to(Fiber& fiber) { swapcontext(&block->scheduler, &fiber.context); }
void first_entry();

void prepare(Fiber& fiber, unsigned char* stack) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, first_entry, 0);
}
#endif

void leave() {
    Fiber& me = *block->running;
    leaves(me.state == State::done ? nullptr : &me.sanitizers, block->scheduler_stack,
           block->scheduler_bytes);
    switch_to_scheduler();
    is_back(me.sanitizers, nullptr, nullptr);
}

void first_entry() {
    is_back(nullptr, &block->scheduler_stack, &block->scheduler_bytes);
    body();
    leave();
}

void enter(Fiber& fiber) {
    block->running = &fiber;
    leaves(&block->sanitizers, fiber.stack, kStackBytes);
    switch_to(fiber);
    is_back(block->sanitizers, nullptr, nullptr);
}

}  // namespace

void wait(State state) {
    block->running->state = state;
    leave();
    if (!block->mistake.empty()) throw Stop{};
}

namespace {

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

static std::set<std::string> launched;  // names of kernels
int capability() {
    const char* given = std::getenv("D2D_HOST_CAPABILITY");
    return given ? std::atoi(given) : 80;
}

std::string never_launched() {
    std::string names;
    for (const auto& [name, entry] : entries())
        if (!launched.count(name)) names += (names.empty() ? "" : " ") + name;
    return names;
}

void launch(const std::string& name, const Grid& grid, const std::vector<uint64_t>& words) {
    const auto found = entries().find(name);
    if (found == entries().end()) throw std::runtime_error("there is no kernel " + name);
    launched.insert(name);
    const unsigned threads = grid.block[0];
    if (threads % kWarp || grid.block[1] != 1 || grid.block[2] != 1)
        throw std::runtime_error(name + ": blocks are one-dimensional, of whole warps");
    std::mt19937 random(grid.seed);
    const std::unique_ptr<unsigned char[]> stacks(new unsigned char[kStackBytes * threads]);
    Changes changes;
    const uint64_t blocks = uint64_t{grid.grid[0]} * grid.grid[1] * grid.grid[2];
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t index =
            grid.seed % 2 ? blocks - 1 - i : i;  // a load is not kept: the other order finds it
        Block state{};
        state.grid = &grid;
        state.changes = &changes;
        state.x = static_cast<unsigned>(index % grid.grid[0]);
        state.y = static_cast<unsigned>(index / grid.grid[0] % grid.grid[1]);
        state.z = static_cast<unsigned>(index / grid.grid[0] / grid.grid[1]);
        state.entry = found->second;
        state.words = words.data();
        state.epoch = 1;
        state.fibers.resize(threads);
        block = &state;
        for (unsigned id = 0; id < threads; ++id) {
            state.fibers[id].id = static_cast<int>(id);
            state.fibers[id].stack = stacks.get() + kStackBytes * id;
            prepare(state.fibers[id], state.fibers[id].stack);
        }
        run_fibers(random);
        block = nullptr;
        if (!state.mistake.empty()) throw std::runtime_error(name + ": " + state.mistake);
    }
}

size_t dynamic_bytes() { return block->grid->shared_bytes; }

namespace {

// What a block may have once its kernel was allowed to (CUDA C++ programming guide, table of compute capabilities).
size_t most_shared() {
    const int here = capability();
    const size_t kib = here < 80 ? 64 : here == 80 || here == 87 ? 163 : here == 90 || here == 100 ? 227 : 99;
    return kib << 10;
}

}  // namespace

Array& shared_array(const std::string& name, size_t count, size_t size, Place place) {
    const auto found = block->arrays.find(name);
    if (found != block->arrays.end()) return found->second;
    const size_t limit = name == kDynamic && dynamic_bytes() > kSharedLimit ? most_shared() : kSharedLimit;
    block->shared_bytes += count * size;
    if (block->shared_bytes > limit)
        mistake("asks for more than " + std::to_string(limit >> 10) + " KiB of shared memory", place);
    Array& array = block->arrays[name];
    array.grain = std::min<size_t>(size, 4);
    array.bytes.assign(count * size, 0xCD);
    array.touched.resize(count * size / array.grain);
    const size_t alignment = name == kDynamic ? 1024 : 16;  // the former is gpu.h's
    array.address = (block->next_address + alignment - 1) / alignment * alignment;
    block->next_address = array.address + count * size + 16;  // so that no two arrays are one
    return array;
}

static void check_word(Touched& touched, bool write, Place place) {
    if (touched.in_flight) mistake("touches bytes of a copy_async that was not waited for", place);
    const int me = block->running->id;
    const unsigned now = block->epoch;
    const bool others_wrote = touched.writer != -1 && touched.writer != me && touched.write_epoch == now;
    const bool others_read = touched.reader != -1 && touched.reader != me && touched.read_epoch == now;
    if (!write && !touched.written) mistake("reads shared memory that nobody wrote", place);
    if (others_wrote)
        mistake("races with a write by thread " + std::to_string(touched.writer) + " (a barrier is missing)",
                place);
    if (write && touched.products) mistake("overwrites what a wgmma may still read", place);
    if (write && others_read)
        mistake("overwrites what another thread may still read (a barrier is missing)", place);
    if (write) {
        touched.written = true;
        touched.writer = me;
        touched.write_epoch = now;
        touched.fences = static_cast<unsigned>(block->running->proxy_fences.size());
    } else {
        touched.reader = others_read ? -2 : me;
        touched.read_epoch = now;
    }
}

void check_access(Array& array, int64_t index, size_t size, bool write, Place place) {
    const size_t count = array.bytes.size() / size;
    if (index < 0 || static_cast<size_t>(index) >= count)
        mistake("touches element " + std::to_string(index) + " of a shared array of " + std::to_string(count),
                place);
    const size_t first = index * size / array.grain, words = std::max<size_t>(size / array.grain, 1);
    for (size_t word = first; word < first + words; ++word) check_word(array.touched[word], write, place);
}

// Elements of 4 bytes and more are kept by the words they hold, smaller ones by their own address.
void check_blocks(uintptr_t at, size_t bytes, Access access, Place place) {
    const Grid& grid = *block->grid;
    const uint64_t me = (uint64_t{block->z} * grid.grid[1] + block->y) * grid.grid[0] + block->x;
    for (size_t word = 0; word < std::max<size_t>(bytes / 4, 1); ++word) {
        const uintptr_t key = bytes < 4 ? ~at : at + 4 * word;
        const auto found = block->changes->find(key);
        const int thread = block->running->id;
        if (found != block->changes->end() &&
            (access != Access::add || found->second.access != Access::add)) {
            const Changed& other = found->second;
            if (other.block != me)
                mistake("touches global memory that another block of the launch changes", place);
            if (other.thread != thread && other.epoch == block->epoch)
                mistake("touches global memory that thread " + std::to_string(other.thread) +
                            " changes (a barrier is missing)",
                        place);
        }
        if (access != Access::load) (*block->changes)[key] = {me, thread, block->epoch, access};
    }
}

void check_global(const void* address, size_t bytes, Access access, Place place) {
    const auto at = reinterpret_cast<uintptr_t>(address);
    if (at % bytes) mistake("touches global memory at an address that is no multiple of its size", place);
    const std::vector<Range>& memory = block->grid->memory;
    for (const Range& range : memory) {
        const auto begin = reinterpret_cast<uintptr_t>(range.begin);
        if (at >= begin && at + bytes <= begin + range.bytes) return check_blocks(at, bytes, access, place);
    }
    mistake("touches global memory outside of every tensor", place);
}

void copy_async(Array& array, int64_t index, const void* from, bool valid, Place place) {
    if (valid) check_global(from, 16, Access::load, place);
    check_access(array, index, 16, true, place);
    Copy copy{&array, index, {}};
    if (valid) std::memcpy(copy.data, from, sizeof(copy.data));
    std::memset(array.bytes.data() + 16 * index, 0xCD, 16);
    for (int word = 0; word < 4; ++word) array.touched[4 * index + word].in_flight = true;
    block->running->open.push_back(copy);
    block->running->place = place;
}

void copy_async_wait(int left, Place place) {
    std::vector<std::vector<Copy>>& groups = block->running->groups;
    while (groups.size() > static_cast<size_t>(left)) {
        for (const Copy& copy : groups.front()) {
            for (int word = 0; word < 4; ++word) {
                Touched& touched = copy.array->touched[4 * copy.index + word];
                touched.in_flight = false;
                // For other threads it is a write of now: a barrier must follow, before that a fence for wgmma.
                touched.write_epoch = block->epoch;
                touched.fences = static_cast<unsigned>(block->running->proxy_fences.size());
            }
            std::memcpy(copy.array->bytes.data() + 16 * copy.index, copy.data, sizeof(copy.data));
        }
        groups.erase(groups.begin());
    }
    block->running->place = place;
}

}  // namespace host

using host::block;
using host::State;

int64_t thread() { return block->running->id; }
int64_t threads() { return static_cast<int64_t>(block->fibers.size()); }
int64_t block_x() { return block->x; }
int64_t block_y() { return block->y; }
int64_t blocks_y() { return block->grid->grid[1]; }
int64_t block_z() { return block->z; }
int64_t blocks_z() { return block->grid->grid[2]; }

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
    struct In {
        int value, mask;
    };
    const In mine{value, mask};
    int result = 0;
    host::together(host::kWarp, &mine, &result, {file, line}, [&](host::Fiber* lanes) {
        const auto in = [&](int lane) { return *static_cast<const In*>(lanes[lane].in); };
        for (int i = 0; i < host::kWarp; ++i)
            if (in(i).mask != mask)
                host::mistake("and others of its warp wait in different shuffles", {file, line});
        for (int i = 0; i < host::kWarp; ++i) *static_cast<int*>(lanes[i].out) = in(i ^ mask).value;
    });
    return result;
}

void copy_async_commit() {
    host::Fiber& me = *block->running;
    me.groups.push_back(std::move(me.open));
    me.open.clear();
}

void ldmatrix_x4(uint32_t (&r)[4], const Shared<Vec16>& from, int64_t i, const char* file, int line) {
    const Vec16 row = from.load(i, file, line);
    host::together(host::kWarp, &row, &r, {file, line}, [](host::Fiber* lanes) {
        for (int matrix = 0; matrix < 4; ++matrix)
            for (int lane = 0; lane < host::kWarp; ++lane) {
                const auto* bytes = static_cast<const unsigned char*>(lanes[8 * matrix + lane / 4].in);
                std::memcpy(static_cast<uint32_t*>(lanes[lane].out) + matrix, bytes + 4 * (lane % 4), 4);
            }
    });
}

namespace {

// D += A B of 16 rows, 8 columns and 4 * Each of k's to a register's lane: Each elements of 32 / Each bits a register.
template <int Each>
void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, host::Place place) {
    constexpr int bits = 32 / Each, depth = 8 * Each;
    struct In {
        uint32_t a[4], b[2];
    };
    const In mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    host::together(host::kWarp, &mine, &d, place, [](host::Fiber* lanes) {
        const auto element = [](uint32_t word, int e) {
            return static_cast<int32_t>(word << (32 - bits * (e + 1))) >> (32 - bits);
        };
        int rows[16][depth], columns[8][depth];
        for (int lane = 0; lane < host::kWarp; ++lane) {
            const In& in = *static_cast<const In*>(lanes[lane].in);
            const int g = lane / 4, t = lane % 4;
            for (int e = 0; e < Each; ++e) {
                const int k = Each * t + e;
                for (int r = 0; r < 4; ++r)
                    rows[g + 8 * (r % 2)][k + 4 * Each * (r / 2)] = element(in.a[r], e);
                for (int r = 0; r < 2; ++r) columns[g][k + 4 * Each * r] = element(in.b[r], e);
            }
        }
        for (int lane = 0; lane < host::kWarp; ++lane)
            for (int r = 0; r < 4; ++r) {
                const int *row = rows[lane / 4 + 8 * (r / 2)], *column = columns[2 * (lane % 4) + r % 2];
                int sum = 0;
                for (int k = 0; k < depth; ++k) sum += row[k] * column[k];
                static_cast<int*>(lanes[lane].out)[r] += sum;
            }
    });
}

}  // namespace

void mma_16_8_32(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* file, int line) {
    mma<4>(d, a, b0, b1, {file, line});
}

void mma_16_8_64(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* file, int line) {
    mma<8>(d, a, b0, b1, {file, line});
}

}  // namespace gpu
