// QuantMatMul in loops that compilers make vectors of: one source for every instruction set.
//
// Bounds for P V of DiT-XL/2, 16 heads, M 256, K 256, N 72, one core at 3.2 GHz with AVX2:
//   operations 75 M multiply-adds, 16 by vpmaddwd and vpaddd, two pipes                          <- the bound
//     102 G/s = 0.74 ms; each also loads 32 bytes of b, two loads a cycle: the same
//   bytes 1 MB + 0.3 MB + 1.2 MB / 20 GB/s = 0.13 ms
// Both sides are widened to int16 once a task; four rows of b share a load of a.
#pragma once

#include <algorithm>
#include <cstring>

#include "quant_matmul.h"
#include "scratch.h"

namespace d2d {
namespace {

constexpr int64_t kRowsATask = 64;
constexpr int64_t kColumns = 4;
constexpr int64_t kPad =
    32;  // int16 values a vector holds at most: rows are padded by zeros, so that no loop has a tail

inline void widen(const int8_t* __restrict from, int64_t k, int64_t padded, int16_t* __restrict to) {
    for (int64_t i = 0; i < k; ++i) to[i] = from[i];
    std::memset(to + k, 0, static_cast<size_t>(padded - k) * sizeof(int16_t));
}

// sums[j] = a . row j of b; `padded` is a multiple of kPad.
inline void products(const int16_t* __restrict a, const int16_t* __restrict b, int64_t padded,
                     int32_t* sums) {
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    const int16_t *b1 = b + padded, *b2 = b1 + padded, *b3 = b2 + padded;
    for (int64_t chunk = 0; chunk < padded; chunk += kPad)
        for (int64_t i = chunk; i < chunk + kPad; ++i) {
            const int32_t value = a[i];
            s0 += value * b[i];
            s1 += value * b1[i];
            s2 += value * b2[i];
            s3 += value * b3[i];
        }
    sums[0] = s0;
    sums[1] = s1;
    sums[2] = s2;
    sums[3] = s3;
}

class Kernel : public CpuKernel {
  public:
    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const MatMulProblem p(inputs, outputs);
        if (p.heads == 0 || p.m == 0 || p.n == 0) return;
        const int64_t blocks = (p.m + kRowsATask - 1) / kRowsATask;
        const int64_t padded = (p.k + kPad - 1) / kPad * kPad;
        const int64_t columns = (p.n + kColumns - 1) / kColumns * kColumns;
        parallel.run(static_cast<size_t>(p.heads * blocks), [&](size_t task) {
            const int64_t head = static_cast<int64_t>(task) / blocks;
            const int64_t begin = static_cast<int64_t>(task) % blocks * kRowsATask;
            const int64_t end = std::min(p.m, begin + kRowsATask);
            int16_t* b = scratch<int16_t>(static_cast<size_t>(columns * padded), 0);
            int16_t* a = scratch<int16_t>(static_cast<size_t>(padded), 1);
            for (int64_t n = 0; n < p.n; ++n)
                widen(p.b + (head * p.n + n) * p.k, p.k, padded, b + n * padded);
            std::memset(b + p.n * padded, 0, static_cast<size_t>((columns - p.n) * padded) * sizeof(int16_t));
            const float* sb = p.sb + head * p.n;
            for (int64_t m = head * p.m + begin; m < head * p.m + end; ++m) {
                widen(p.a + m * p.k, p.k, padded, a);
                float* y = p.y + m * p.n;
                for (int64_t n = 0; n < p.n; n += kColumns) {
                    int32_t sums[kColumns];
                    products(a, b + n * padded, padded, sums);
                    for (int64_t j = 0; j < std::min(kColumns, p.n - n); ++j)
                        y[n + j] = static_cast<float>(sums[j]) * p.sa[m] * sb[n + j];
                }
            }
        });
    }
};

}  // namespace
}  // namespace d2d
