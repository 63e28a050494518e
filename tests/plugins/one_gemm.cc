// A ternary GEMM on the emulator: 70 tokens, 70 outputs, a branch of rank 5,
// two gates and a residual; on 64x64 tiles, whole or in slices of K, or on
// wgmma.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <vector>

#include "cuda_wgmma.h"
#include "emulator.h"

template <class T> uint64_t word(const std::vector<T> &values) {
  return reinterpret_cast<uint64_t>(values.data());
}

template <class T> std::vector<T> read(const char *path, size_t count) {
  std::vector<T> values(count);
  std::ifstream(path, std::ios::binary)
      .read(reinterpret_cast<char *>(values.data()),
            static_cast<std::streamsize>(sizeof(T) * count));
  return values;
}

// one_gemm WORDS SUMS K HOW: prints the emulator's report, or where y is not
// the output's sum (activation k is 1 + k / 64) and what is added; nothing
// where all is right. HOW: whole, wgmma or a number of slices.
int main(int argc, char **argv) {
  if (argc != 5)
    return 2;
  constexpr size_t m = 70, n = 70, rank = 5;
  const size_t k = static_cast<size_t>(std::stoi(argv[3]));
  const bool wgmma = !std::strcmp(argv[4], "wgmma"),
             whole = !std::strcmp(argv[4], "whole");
  const unsigned slices =
      wgmma || whole ? 0 : static_cast<unsigned>(std::stoi(argv[4]));
  // [strips of 32][units of 64 k's][words of a unit]
  const auto w = read<int32_t>(argv[1], 3 * ((k + 63) / 64) * 128);
  const auto sums = read<float>(argv[2], n);
  std::vector<int8_t> q(m * k);
  for (size_t i = 0; i < q.size(); ++i)
    q[i] = static_cast<int8_t>(1 + i % k / 64);
  const std::vector<float> s(m, 1), ws(n, 1), bias(n, 1), t(m * rank, 1),
      up(n * rank, 1), residual(m * n, 3);
  std::vector<float> gate(n, 2); // of the first 35 tokens
  gate.resize(2 * n, 4);
  for (unsigned seed = 0; seed < 3; ++seed) {
    const std::vector<float> y(m * n, -1e9f);
    std::vector<uint64_t> words = {
        word(q),  word(s),        word(w),    word(ws), word(bias), word(t),
        word(up), word(y),        m,          n,        k,          1,
        rank,     word(residual), word(gate), m / 2,    1,          0};
    const auto launch = [&](const char *name, gpu::host::Grid grid,
                            const std::vector<uint64_t> &words) {
      grid.seed = seed;
      grid.memory = {{q.data(), q.size()},
                     {s.data(), 4 * s.size()},
                     {w.data(), 4 * w.size()},
                     {ws.data(), 4 * ws.size()},
                     {t.data(), 4 * t.size()},
                     {up.data(), 4 * up.size()},
                     {bias.data(), 4 * bias.size()},
                     {y.data(), 4 * y.size()},
                     {residual.data(), 4 * residual.size()},
                     {gate.data(), 4 * gate.size()}};
      gpu::host::launch(name, grid, words);
    };
    try {
      if (wgmma) {
        const auto bytes =
            16 * static_cast<unsigned>(d2d::wgmma_pieces(d2d::kFormats[0], 8));
        launch("ternary_gemm_128x256_wgmma",
               {{1, 1, 1}, {256, 1, 1}, bytes, 0, {}}, words);
      } else if (whole) {
        launch("ternary_gemm_64x64", {{2, 2, 1}, {128, 1, 1}, 0, 0, {}}, words);
      } else {
        launch("gemm_zero", {{20, 1, 1}, {256, 1, 1}, 0, 0, {}},
               {word(y), m * n});
        launch("ternary_gemm_64x64_slice",
               {{2, 2, slices}, {128, 1, 1}, 0, 0, {}}, words);
        words.push_back(6); // spare bits of a byte
        words.push_back(word(y));
        launch("gemm_finish", {{1, m, 1}, {256, 1, 1}, 0, 0, {}}, words);
      }
    } catch (const std::exception &error) {
      std::printf("%s", error.what());
      return 1;
    }
    for (size_t i = 0; i < m * n; ++i) {
      const float want =
          3 + gate[i / (m / 2 * n) * n] * (sums[i % n] + 1 + rank);
      if (y[i] != want) {
        std::printf("y[%zu] is %g, not %g", i, y[i], want);
        return 1;
      }
    }
  }
  return 0;
}
