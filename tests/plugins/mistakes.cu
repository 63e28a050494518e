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

// mistakes KERNEL SEED: prints the emulator's report, or what the kernel wrote.
int main(int argc, char **argv) {
  if (argc != 3)
    return 2;
  int64_t out[kThreads] = {};
  gpu::host::Grid grid{{1, 1, 1},
                       {kThreads, 1, 1},
                       256,
                       static_cast<unsigned>(std::atoi(argv[2]))};
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
