// A product of a warpgroup on the emulator, its B in each way that a
// descriptor knows, and with one mistake each.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "wgmma.h"

constexpr int kRows = 64, kColumns = 24, kDepth = 32;
constexpr int64_t kThreads = 128;

int8_t a_of(int row, int k) { return static_cast<int8_t>(row * 7 + k * 3); }
int8_t b_of(int column, int k) { return static_cast<int8_t>(column * 5 - k); }

// How B lies, by the PTX ISA's figures: pieces of 16 bytes in rows of
// `row_bytes`, of which the product reads two from `first` on.
struct Layout {
  int mode, row_bytes, first, leading, stride;

  // In pieces.
  int place(int column, int piece) const {
    const int row = column % 8, group = column / 8 * stride / 16;
    switch (mode) {
    case 0:
      return group + piece * leading / 16 + row;
    case 1:
      return group + 8 * row + ((first + piece) ^ row);
    case 2:
      return group + 4 * row + ((first + piece) ^ row / 2);
    default:
      return group + 2 * row + ((first + piece) ^ row / 4);
    }
  }

  uint64_t descriptor(uint64_t address) const {
    return static_cast<uint64_t>(mode) << 62 |
           static_cast<uint64_t>(stride / 16) << 32 |
           static_cast<uint64_t>(leading / 16) << 16 |
           (address / 16 + static_cast<uint64_t>(first));
  }
};

constexpr Layout kLayouts[] = {
    {0, 16, 0, 384, 1024}, {1, 128, 0, 16, 2048}, {1, 128, 2, 16, 1024},
    {1, 128, 6, 16, 1024}, {2, 64, 0, 16, 512},   {2, 64, 2, 0, 2048},
    {3, 32, 0, 16, 256},
};
constexpr int kPieces = 512;

gpu::Shared<gpu::Vec16> filled(const Layout &layout) {
  const auto memory = gpu::dynamic_shared<gpu::Vec16>(kPieces);
  if (gpu::thread() < 2 * kColumns) {
    const int column = static_cast<int>(gpu::thread()) / 2,
              piece = static_cast<int>(gpu::thread()) % 2;
    int8_t bytes[16];
    for (int i = 0; i < 16; ++i)
      bytes[i] = b_of(column, 16 * piece + i);
    gpu::Vec16 value;
    std::memcpy(&value, bytes, 16);
    memory.store(layout.place(column, piece), value);
  }
  return memory;
}

uint64_t address_of(const gpu::Shared<gpu::Vec16> &memory) {
  return (gpu::wgmma_descriptor(memory, 0) & 0x3FFF) * 16;
}

void load(gpu::WgmmaRows &a) {
  const int thread = static_cast<int>(gpu::thread()), lane = thread % 32;
  for (int r = 0; r < 4; ++r) {
    int8_t bytes[4];
    for (int e = 0; e < 4; ++e)
      bytes[e] = a_of(thread / 32 * 16 + lane / 4 + 8 * (r % 2),
                      4 * (lane % 4) + e + 16 * (r / 2));
    uint32_t word;
    std::memcpy(&word, bytes, 4);
    a.set(r, word);
  }
}

void publish() {
  gpu::fence_async_proxy();
  gpu::sync_block();
}

void write(int *out, const gpu::WgmmaSums<kColumns> &d) {
  const int thread = static_cast<int>(gpu::thread()), lane = thread % 32;
  for (int r = 0; r < kColumns / 2; ++r) {
    const int row = thread / 32 * 16 + lane / 4 + 8 * (r / 2 % 2),
              column = 8 * (r / 4) + 2 * (lane % 4) + r % 2;
    out[row * kColumns + column] = d.at(r);
  }
}

// Twice the product: both are under way at once.
GPU_KERNEL(sound, int *out, int64_t which) {
  const Layout &layout = kLayouts[which];
  const auto memory = filled(layout);
  gpu::WgmmaSums<kColumns> d;
  gpu::WgmmaRows a;
  load(a);
  publish();
  gpu::wgmma_fence();
  gpu::wgmma(d, a, layout.descriptor(address_of(memory)));
  gpu::wgmma_commit();
  gpu::wgmma(d, a, layout.descriptor(address_of(memory)));
  gpu::wgmma_commit();
  gpu::wgmma_wait<1>();
  gpu::wgmma_wait<0>();
  write(out, d);
}

// A kernel whose product is as `sound`'s but for what stands in BEFORE, NAMED
// (the descriptor), and AFTER.
#define MISTAKE(name, BEFORE, NAMED, AFTER)                                    \
  GPU_KERNEL(name, int *out, int64_t) {                                        \
    const Layout &layout = kLayouts[4];                                        \
    const auto memory = filled(layout);                                        \
    uint64_t b = layout.descriptor(address_of(memory));                        \
    gpu::WgmmaSums<kColumns> d;                                                \
    gpu::WgmmaRows a;                                                          \
    load(a);                                                                   \
    BEFORE;                                                                    \
    NAMED;                                                                     \
    gpu::wgmma(d, a, b);                                                       \
    AFTER;                                                                     \
    write(out, d);                                                             \
  }
#define FENCED publish(), gpu::wgmma_fence()
#define WAITED gpu::wgmma_commit(), gpu::wgmma_wait<0>()

MISTAKE(sums_read_before_the_wait, FENCED, , gpu::wgmma_commit())
MISTAKE(wait_for_too_few, FENCED, , (gpu::wgmma_commit(), gpu::wgmma_wait<1>()))
MISTAKE(never_committed, FENCED, , gpu::wgmma_wait<0>())
MISTAKE(rows_changed_before_the_wait, FENCED, , (load(a), WAITED))
MISTAKE(registers_not_fenced, publish(), , WAITED)
MISTAKE(registers_changed_after_the_fence, (FENCED, load(a)), , WAITED)
MISTAKE(shared_memory_not_fenced, (gpu::sync_block(), gpu::wgmma_fence()), ,
        WAITED)
MISTAKE(fenced_after_the_barrier,
        (gpu::sync_block(), gpu::fence_async_proxy(), gpu::wgmma_fence()), ,
        WAITED)
MISTAKE(no_barrier, (gpu::fence_async_proxy(), gpu::wgmma_fence()), , WAITED)
MISTAKE(overwritten_before_the_wait, FENCED, ,
        (gpu::wgmma_commit(), filled(layout), gpu::wgmma_wait<0>()))
MISTAKE(overwritten_without_a_barrier, FENCED, , (WAITED, filled(layout)))
MISTAKE(other_matrices, FENCED, b += gpu::thread() / 32, WAITED)
MISTAKE(unwritten_columns, FENCED, b += 512 / 16, WAITED)
MISTAKE(outside, FENCED, b += 1024, WAITED)
MISTAKE(off_its_atom, FENCED, b += 64 / 16, WAITED)
MISTAKE(base_offset, FENCED, b |= 1ull << 49, WAITED)
MISTAKE(one_warp_left, FENCED, if (gpu::thread() < 32) return, WAITED)

GPU_KERNEL(one_warp_elsewhere, int *, int64_t) {
  const auto memory = filled(kLayouts[4]);
  const uint64_t b = kLayouts[4].descriptor(address_of(memory));
  gpu::WgmmaSums<kColumns> d;
  gpu::WgmmaRows a;
  load(a);
  FENCED;
  if (gpu::thread() < 32)
    gpu::wgmma(d, a, b);
  else
    gpu::wgmma(d, a, b);
  WAITED;
}

GPU_KERNEL(registers_left, int *, int64_t) {
  const auto memory = filled(kLayouts[4]);
  gpu::WgmmaSums<kColumns> d;
  {
    gpu::WgmmaRows a;
    load(a);
    FENCED;
    gpu::wgmma(d, a, kLayouts[4].descriptor(address_of(memory)));
    gpu::wgmma_commit();
  }
  gpu::wgmma_wait<0>();
}

GPU_KERNEL(copies_not_fenced, int *out, int64_t) {
  const auto memory = gpu::dynamic_shared<gpu::Vec16>(kPieces);
  gpu::WgmmaSums<kColumns> d;
  gpu::WgmmaRows a;
  load(a);
  gpu::copy_async(memory, gpu::thread(), out, false);
  gpu::fence_async_proxy(); // before they have arrived
  gpu::copy_async_commit();
  gpu::copy_async_wait<0>();
  gpu::sync_block();
  gpu::wgmma_fence();
  gpu::wgmma(d, a, kLayouts[4].descriptor(address_of(memory)));
}

// wgmma KERNEL SEED WHICH: prints the emulator's report, or D.
int main(int argc, char **argv) {
  if (argc != 4)
    return 2;
  static int out[kRows * kColumns];
  const gpu::host::Grid grid{{1, 1, 1},
                             {kThreads, 1, 1},
                             16 * kPieces,
                             static_cast<unsigned>(std::atoi(argv[2])),
                             {{out, sizeof(out)}}};
  try {
    gpu::host::launch(argv[1], grid,
                      {reinterpret_cast<uint64_t>(out),
                       static_cast<uint64_t>(std::atoi(argv[3]))});
  } catch (const std::exception &error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  for (int value : out)
    std::printf("%d ", value);
  return 0;
}
