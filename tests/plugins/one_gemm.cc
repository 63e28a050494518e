// One launch of ternary_gemm_64x64 on the emulator: 70 tokens, 70 outputs, K
// 208, a branch of rank 5.
#include <cstdio>
#include <fstream>
#include <vector>

#include "emulator.h"

template <class T> uint64_t word(const std::vector<T> &values) {
  return reinterpret_cast<uint64_t>(values.data());
}

// one_gemm WORDS: prints the emulator's report, nothing where there is none.
int main(int argc, char **argv) {
  if (argc != 2)
    return 2;
  constexpr size_t m = 70, n = 70, k = 208, rank = 5;
  std::vector<int32_t> w(
      3 * 4 * 128); // [strips of 32][units of 64 k's][words of a unit]
  std::ifstream(argv[1], std::ios::binary)
      .read(reinterpret_cast<char *>(w.data()),
            static_cast<std::streamsize>(4 * w.size()));
  const std::vector<int8_t> q(m * k, 1);
  const std::vector<float> s(m, 1), ws(n, 1), bias(n, 1), t(m * rank, 1),
      up(n * rank, 1), y(m * n);
  for (unsigned seed = 0; seed < 3; ++seed) {
    gpu::host::Grid grid{{2, 2, 1}, {128, 1, 1}, 0, seed, {}};
    grid.memory = {{q.data(), q.size()},           {s.data(), 4 * s.size()},
                   {w.data(), 4 * w.size()},       {ws.data(), 4 * ws.size()},
                   {t.data(), 4 * t.size()},       {up.data(), 4 * up.size()},
                   {bias.data(), 4 * bias.size()}, {y.data(), 4 * y.size()}};
    try {
      gpu::host::launch("ternary_gemm_64x64", grid,
                        {word(q), word(s), word(w), word(ws), word(bias),
                         word(t), word(up), word(y), m, n, k, 1, rank});
    } catch (const std::exception &error) {
      std::printf("%s", error.what());
      return 1;
    }
  }
  return 0;
}
