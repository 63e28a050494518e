// Kernels with one mistake each, and one without: what the emulator must see.
// Blocks of 64 threads.
#include <cstdio>
#include <cstdlib>

#include "gpu.h"

constexpr int kThreads = 64;

GPU_KERNEL(sound, int64_t *out) {
  GPU_SHARED(int64_t, values, kThreads);
  const int64_t me = gpu::thread();
  values.store(me, gpu::shuffle_xor(static_cast<int>(me), 1));
  gpu::sync_block();
  const int64_t other = values.load(kThreads - 1 - me);
  gpu::sync_block();
  values.store(kThreads - 1 - me, other + 1);
  gpu::sync_block();
  out[me] = values.load(me);
}

GPU_KERNEL(barrier_removed, int64_t *out) {
  GPU_SHARED(int64_t, values, kThreads);
  const int64_t me = gpu::thread();
  values.store(me, me);
  gpu::sync_block();
  values.store(me, 2 * me);
  out[me] = values.load(kThreads - 1 - me);
}

GPU_KERNEL(second_barrier_removed, int64_t *out) {
  GPU_SHARED(int64_t, values, kThreads);
  const int64_t me = gpu::thread();
  values.store(me, me);
  gpu::sync_block();
  out[me] = values.load(kThreads - 1 - me);
  values.store(me, out[me]);
}

GPU_KERNEL(two_writers, int64_t *) {
  GPU_SHARED(int64_t, values, kThreads);
  values.store(gpu::thread() / 2, 1);
}

GPU_KERNEL(out_of_bounds, int64_t *) {
  GPU_SHARED(int64_t, values, kThreads);
  values.store(gpu::thread() + 1, 1);
}

GPU_KERNEL(before_the_start, int64_t *out) {
  GPU_SHARED(int64_t, values, kThreads);
  values.store(gpu::thread(), 1);
  gpu::sync_block();
  out[0] = values.load(gpu::thread() - 1);
}

GPU_KERNEL(divergent_barrier, int64_t *) {
  if (gpu::thread() < 32)
    gpu::sync_block();
  else
    gpu::sync_block();
}

GPU_KERNEL(unwritten_read, int64_t *out) {
  GPU_SHARED(int64_t, values, kThreads);
  const int64_t me = gpu::thread();
  if (me)
    values.store(me, me);
  out[me] = values.load(me);
}

GPU_KERNEL(leaves_before_a_barrier, int64_t *) {
  if (gpu::thread() == 7)
    return;
  gpu::sync_block();
}

GPU_KERNEL(leaves_before_a_shuffle, int64_t *out) {
  if (gpu::thread() == 7)
    return;
  out[gpu::thread()] = gpu::shuffle_xor(1, 1);
}

GPU_KERNEL(divergent_shuffle, int64_t *out) {
  const int mask = gpu::thread() % 32 < 16 ? 1 : 2;
  out[gpu::thread()] = gpu::shuffle_xor(1, mask);
}

GPU_KERNEL(too_much_shared, int64_t *) { GPU_SHARED(int64_t, values, 7000); }

GPU_KERNEL(too_much_dynamic, int64_t *) { gpu::dynamic_shared<int64_t>(33); }

GPU_DEVICE gpu::Vec16 four(int first) {
  const auto value = static_cast<uint32_t>(first);
  return {value, value + 1, value + 2, value + 3};
}

// What a thread brings, its neighbour in the other warp reads.
GPU_KERNEL(sound_copies, int64_t *out) {
  GPU_SHARED(gpu::Vec16, pieces, 2 * kThreads);
  const int64_t me = gpu::thread(), other = kThreads - 1 - me;
  for (int i = 0; i < 2; ++i) {
    gpu::copy_async(pieces, i * kThreads + me, out + 2 * (me % 32), i == 0);
    gpu::copy_async_commit();
  }
  gpu::copy_async_wait<1>();
  gpu::sync_block();
  const gpu::Vec16 first = pieces.load(other);
  gpu::copy_async_wait<0>();
  gpu::sync_block();
  out[me] = first.x + pieces.load(kThreads + other).w + 1 +
            pieces.load_part<gpu::Vec8>(2 * (kThreads + me)).y;
}

// D = A B of A[row][k] = row + 3 k - 40 and B[k][column] = 5 column - k, A
// through ldmatrix.
GPU_KERNEL(product, int64_t *out) {
  GPU_SHARED(gpu::Vec16, a, 32);
  const int me = static_cast<int>(gpu::thread()), g = me / 4, t = me % 4;
  if (me >= 32)
    return;
  uint32_t b[2] = {}, rows[4], words[4] = {};
  for (int k = 0; k < 16;
       ++k) // this lane stores bytes 16 (me / 16) .. of row me % 16
    words[k / 4] |=
        static_cast<uint32_t>((me % 16 + 3 * (me / 16 * 16 + k) - 40) & 255)
        << 8 * (k % 4);
  a.store(me, {words[0], words[1], words[2], words[3]});
  for (int i = 0; i < 8; ++i)
    b[i / 4] |=
        static_cast<uint32_t>((5 * g - (4 * t + i % 4 + i / 4 * 16)) & 255)
        << 8 * (i % 4);
  int d[4] = {};
  gpu::shuffle_xor(0, 1);
  // Rows 0-7 and 8-15 of the first 16 k's, then of the second.
  gpu::ldmatrix_x4(rows, a, me % 16 + 16 * (me / 16));
  gpu::mma_16_8_32(d, rows, b[0], b[1]);
  for (int r = 0; r < 4; ++r)
    out[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = d[r];
}

// The same of int4, k 0 .. 63: A[row][k] = (row + 3 k) % 16 - 8 and
// B[k][column] = (5 column - k) % 16 - 8, two's complement.
GPU_KERNEL(product_of_nibbles, int64_t *out) {
  const int me = static_cast<int>(gpu::thread()), g = me / 4, t = me % 4;
  if (me >= 32)
    return;
  uint32_t a[4] = {}, b[2] = {};
  for (int e = 0; e < 8; ++e) {
    for (int r = 0; r < 4; ++r) {
      const int row = g + 8 * (r % 2), k = 8 * t + e + 32 * (r / 2);
      a[r] |= static_cast<uint32_t>((row + 3 * k - 8) & 15) << 4 * e;
    }
    for (int r = 0; r < 2; ++r)
      b[r] |= static_cast<uint32_t>((5 * g - (8 * t + e + 32 * r) - 8) & 15)
              << 4 * e;
  }
  int d[4] = {};
  gpu::mma_16_8_64(d, a, b[0], b[1]);
  for (int r = 0; r < 4; ++r)
    out[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = d[r];
}

GPU_KERNEL(copy_read_before_the_wait, int64_t *out) {
  GPU_SHARED(gpu::Vec16, pieces, kThreads);
  gpu::copy_async(pieces, gpu::thread(), out, true);
  gpu::copy_async_commit();
  out[gpu::thread()] = pieces.load(gpu::thread()).x;
}

GPU_KERNEL(wait_one_too_weak, int64_t *out) {
  GPU_SHARED(gpu::Vec16, pieces, 2 * kThreads);
  for (int i = 0; i < 2; ++i) {
    gpu::copy_async(pieces, kThreads * i + gpu::thread(), out, true);
    gpu::copy_async_commit();
  }
  gpu::copy_async_wait<1>();
  out[gpu::thread()] = pieces.load(kThreads + gpu::thread()).x;
}

GPU_KERNEL(copy_read_without_a_barrier, int64_t *out) {
  GPU_SHARED(gpu::Vec16, pieces, kThreads);
  gpu::copy_async(pieces, gpu::thread(), out, true);
  gpu::copy_async_commit();
  gpu::copy_async_wait<0>();
  gpu::shuffle_xor(0, 1); // brings the lanes together, but orders no memory
  out[gpu::thread()] = pieces.load(gpu::thread() ^ 1).x;
}

GPU_KERNEL(copy_over_what_is_read, int64_t *out) {
  GPU_SHARED(gpu::Vec16, pieces, kThreads);
  pieces.store(gpu::thread(), four(1));
  gpu::sync_block();
  out[gpu::thread()] = pieces.load(gpu::thread() ^ 1).x;
  gpu::shuffle_xor(0, 1);
  gpu::copy_async(pieces, gpu::thread(), out, true);
}

GPU_KERNEL(copy_never_waited_for, int64_t *out) {
  GPU_SHARED(gpu::Vec16, pieces, kThreads);
  gpu::copy_async(pieces, gpu::thread(), out, true);
  gpu::copy_async_commit();
}

GPU_KERNEL(copy_never_committed, int64_t *out) {
  GPU_SHARED(gpu::Vec16, pieces, kThreads);
  gpu::copy_async(pieces, gpu::thread(), out, true);
  gpu::copy_async_wait<0>();
}

GPU_KERNEL(copy_out_of_bounds, int64_t *out) {
  GPU_SHARED(gpu::Vec16, pieces, kThreads);
  gpu::copy_async(pieces, gpu::thread() + 1, out, true);
  gpu::copy_async_commit();
  gpu::copy_async_wait<0>();
}

GPU_KERNEL(copy_from_outside, int64_t *out) {
  GPU_SHARED(gpu::Vec16, pieces, kThreads);
  gpu::copy_async(pieces, gpu::thread(), out + 128, true);
}

GPU_KERNEL(global_out_of_bounds, int64_t *out) {
  gpu::store(out + 65 + gpu::thread(), int64_t{1});
}

GPU_KERNEL(global_misaligned, int64_t *out) {
  gpu::load(reinterpret_cast<const gpu::Vec16 *>(out + 1));
}

GPU_KERNEL(matrix_of_unwritten_rows, int64_t *) {
  GPU_SHARED(gpu::Vec16, pieces, 32);
  uint32_t r[4];
  gpu::ldmatrix_x4(r, pieces, gpu::thread() % 32);
}

GPU_KERNEL(matrix_out_of_bounds, int64_t *) {
  GPU_SHARED(gpu::Vec16, pieces, 32);
  uint32_t r[4];
  gpu::ldmatrix_x4(r, pieces, gpu::thread() % 32 + 1 + 31);
}

GPU_KERNEL(divergent_product, int64_t *) {
  int d[4] = {};
  const uint32_t a[4] = {};
  if (gpu::thread() == 5)
    gpu::mma_16_8_32(d, a, 0, 0);
  else
    gpu::mma_16_8_32(d, a, 0, 0);
}

GPU_KERNEL(leaves_before_a_product, int64_t *) {
  int d[4] = {};
  const uint32_t a[4] = {};
  if (gpu::thread() == 7)
    return;
  gpu::mma_16_8_32(d, a, 0, 0);
}

// mistakes KERNEL SEED: prints the emulator's report, or what the kernel wrote.
int main(int argc, char **argv) {
  if (argc != 3)
    return 2;
  constexpr int kOut = 2 * kThreads;
  alignas(16) int64_t out[kOut] = {};
  gpu::host::Grid grid{{1, 1, 1},
                       {kThreads, 1, 1},
                       256,
                       static_cast<unsigned>(std::atoi(argv[2])),
                       {{out, sizeof(out)}}};
  try {
    gpu::host::launch(argv[1], grid, {reinterpret_cast<uint64_t>(out)});
  } catch (const std::exception &error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  for (int64_t value : out)
    std::printf("%lld ", static_cast<long long>(value));
  return 0;
}
