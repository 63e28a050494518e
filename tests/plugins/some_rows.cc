// Five rows of ada_ln_hadamard_quantize_warps on the emulator, in three orders.
#include <cstdio>
#include <vector>

#include "emulator.h"

template <class T> uint64_t word(const std::vector<T> &values) {
  return reinterpret_cast<uint64_t>(values.data());
}

// some_rows K: prints the emulator's report, nothing where there is none.
int main(int argc, char **argv) {
  if (argc != 2)
    return 2;
  constexpr size_t m = 5;
  const size_t k = std::stoul(argv[1]), warps = (k + 1535) / 1536;
  const unsigned rows = static_cast<unsigned>(4 / warps);
  const std::vector<float> x(m * k, 2), qmax(1, 7), shift(k, 1), scale(k, 1),
      eps(1, 1e-6f), s(m), y(m * k);
  const std::vector<int8_t> q(m * k);
  for (unsigned seed = 0; seed < 3; ++seed) {
    gpu::host::Grid grid{{(m + rows - 1) / rows, 1, 1},
                         {static_cast<unsigned>(32 * rows * warps), 1, 1},
                         0,
                         seed,
                         {}};
    grid.memory = {
        {x.data(), 4 * x.size()},         {q.data(), q.size()},
        {qmax.data(), 4 * qmax.size()},   {s.data(), 4 * s.size()},
        {shift.data(), 4 * shift.size()}, {eps.data(), 4 * eps.size()},
        {scale.data(), 4 * scale.size()}, {y.data(), 4 * y.size()}};
    try {
      gpu::host::launch("ada_ln_hadamard_quantize_warps", grid,
                        {word(x), word(qmax), word(q), word(s), k, 32, m, m, 1,
                         0, 0, 1, word(shift), word(scale), word(eps), word(y),
                         m});
    } catch (const std::exception &error) {
      std::printf("%s", error.what());
      return 1;
    }
  }
  return 0;
}
