// MonarchAdd with vectors of an instruction set: one source for all, in the compiler's own vector types.
//
// Bounds for DiT-XL/2 fc1, 256 tokens, K 1152, N 4608, a 4 x 4 grid of rank 4 (as many parameters as rank 16), one core
// at 3.2 GHz with two multiply-adds of 8 floats a cycle:
//   operations 256 * 4 * (4 * 1152 + 4 * 4608) = 23.6 M multiply-adds / 51.2 G/s           = 0.46 ms
//   bytes 256 * 4 * (1152 + 2 * 4608) + 92160 * 4 = 11.0 MB / 20 GB/s                      = 0.55 ms  <- the bound
// So: on both bounds, and two MatMuls with their transposes would move the outputs four times. Outputs are lanes in both
// halves, so that x, plain and y stay as they lie: z comes out in the order (a, i, b), and a vector of outputs needs
// z[a, i, o % B] of its lanes, which repeats itself every lcm(B, lanes) outputs: z is written out that often. Two vectors
// of outputs that need the same z go together, and a strip of the factor for both is copied once for all tokens of a task.
//
// In an anonymous namespace: each file compiles its own copy with its own flags, and the linker must not merge them.
#pragma once

#include <cstring>
#include <type_traits>

#include "monarch.h"
#include "scratch.h"

namespace d2d {
namespace {

template <int Width>
struct Vectors {
    typedef float Floats __attribute__((vector_size(Width * 4)));
};

inline int64_t common_multiple(int64_t a, int64_t b) {
    int64_t x = a, y = b;
    while (y) {
        const int64_t rest = x % y;
        x = y;
        y = rest;
    }
    return a / x * b;
}

// `Isa`: kWidth floats a vector, and multiply_add(a, b, c) = a * b + c with one rounding.
template <class Isa>
class TiledMonarch : public CpuKernel {
    static constexpr int64_t kWidth = Isa::kWidth, kPair = 2 * kWidth;
    static constexpr int64_t kTokens = 32;  // of a task
    static constexpr int kRows = 4;         // tokens side by side: 8 sums hide the latency of multiply-adds
    static constexpr int64_t kDepth = 256;  // of a strip: 16 KiB of 16 outputs
    using Floats = typename Vectors<kWidth>::Floats;
    enum Slot { kStrip, kMiddle, kRepeated };

  public:
    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const MonarchProblem p(inputs, outputs);
        parallel.run(static_cast<size_t>((p.m + kTokens - 1) / kTokens), [&](size_t task) {
            const int64_t first = static_cast<int64_t>(task) * kTokens;
            const int64_t count = p.m - first < kTokens ? p.m - first : kTokens;
            const int64_t padded = (p.columns() + kPair - 1) / kPair * kPair;
            const int64_t period = common_multiple(p.blocks_out, kWidth);
            float* z = scratch<float>(static_cast<size_t>(count * p.blocks_in * padded), kMiddle);
            float* repeated = scratch<float>(static_cast<size_t>(count * p.inner() * period), kRepeated);
            go_down(p, p.x + first * p.k, count, padded, z);
            for (int64_t token = 0; token < count; ++token)
                for (int64_t j = 0; j < p.inner(); ++j) {
                    const float* from =
                        z + (token * p.blocks_in + j / p.rank) * padded + j % p.rank * p.blocks_out;
                    float* to = repeated + (token * p.inner() + j) * period;
                    for (int64_t l = 0; l < period; l += p.blocks_out)
                        for (int64_t b = 0; b < p.blocks_out; ++b) to[l + b] = from[b];
                }
            go_up(p, p.plain + first * p.n, count, repeated, period, p.y + first * p.n);
        });
    }

  private:
    static Floats load(const float* from) {
        Floats value;
        std::memcpy(&value, from, sizeof(value));
        return value;
    }

    static void store(float* to, const Floats& value) { std::memcpy(to, &value, sizeof(value)); }

    static int64_t clamped(int64_t count) { return count < 0 ? 0 : count < kWidth ? count : kWidth; }

    // The first `count` lanes; zeros in the others.
    static Floats load_some(const float* from, int64_t count) {
        if (count == kWidth) return load(from);
        Floats value{};
        std::memcpy(&value, from, static_cast<size_t>(count) * sizeof(float));
        return value;
    }

    static void store_some(float* to, const Floats& value, int64_t count) {
        if (count == kWidth) return store(to, value);
        std::memcpy(to, &value, static_cast<size_t>(count) * sizeof(float));
    }

    // Rows of `low` lanes at `from` and `high` lanes at `from` + apart, side by side.
    static void pack(const float* from, int64_t stride, int64_t rows, int64_t apart, int64_t low,
                     int64_t high, float* strip) {
        for (int64_t row = 0; row < rows; ++row, from += stride, strip += kPair) {
            store(strip, load_some(from, low));
            store(strip + kWidth, high ? load_some(from + apart, high) : Floats{});
        }
    }

    // z[token, a, c] for two vectors of columns c at a time, a stretch of inputs at a time.
    static void go_down(const MonarchProblem& p, const float* x, int64_t count, int64_t padded, float* z) {
        float* strip = scratch<float>(static_cast<size_t>(kDepth * kPair), kStrip);
        const int64_t stride = p.blocks_in * padded;
        for (int64_t a = 0; a < p.blocks_in; ++a)
            for (int64_t c = 0; c < p.columns(); c += kPair)
                for (int64_t start = 0; start < p.width(); start += kDepth) {
                    const int64_t rows = p.width() - start < kDepth ? p.width() - start : kDepth;
                    const int64_t row = a * p.width() + start;
                    pack(p.down + row * p.columns() + c, p.columns(), rows, kWidth, clamped(p.columns() - c),
                         clamped(p.columns() - c - kWidth), strip);
                    float* to = z + a * padded + c;
                    int64_t token = 0;
                    for (; token + kRows <= count; token += kRows)
                        add_inputs<kRows>(x + token * p.k + row, p.k, strip, rows, start == 0,
                                          to + token * stride, stride);
                    for (; token < count; ++token)
                        add_inputs<1>(x + token * p.k + row, p.k, strip, rows, start == 0,
                                      to + token * stride, stride);
                }
    }

    template <int Rows>
    static void add_inputs(const float* x, int64_t k, const float* strip, int64_t rows, bool first, float* to,
                           int64_t stride) {
        Floats sums[Rows][2];
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i)
            for (int v = 0; v < 2; ++v) sums[i][v] = first ? Floats{} : load(to + i * stride + v * kWidth);
        for (int64_t j = 0; j < rows; ++j) {
            const Floats low = load(strip + j * kPair), high = load(strip + j * kPair + kWidth);
#pragma GCC unroll 4
            for (int i = 0; i < Rows; ++i) {
                const Floats one = x[i * k + j] - Floats{};
                sums[i][0] = Isa::multiply_add(one, low, sums[i][0]);
                sums[i][1] = Isa::multiply_add(one, high, sums[i][1]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i)
            for (int v = 0; v < 2; ++v) store(to + i * stride + v * kWidth, sums[i][v]);
    }

    // Outputs o and o + period, a vector of each, which need the same lanes of z.
    static void go_up(const MonarchProblem& p, const float* plain, int64_t count, const float* z,
                      int64_t period, float* y) {
        float* strip = scratch<float>(static_cast<size_t>(p.inner() * kPair), kStrip);
        for (int64_t base = 0; base < p.n; base += 2 * period)
            for (int64_t phase = 0; phase < period && base + phase < p.n; phase += kWidth) {
                const int64_t o = base + phase, low = clamped(p.n - o), high = clamped(p.n - o - period);
                pack(p.up + o, p.n, p.inner(), period, low, high, strip);
                const auto some = [&](auto rows, int64_t token) {
                    add_middle<decltype(rows)::value>(plain + token * p.n + o, p.n, period, low, high, strip,
                                                      p.inner(), z + token * p.inner() * period + phase,
                                                      y + token * p.n + o);
                };
                int64_t token = 0;
                for (; token + kRows <= count; token += kRows)
                    some(std::integral_constant<int, kRows>{}, token);
                for (; token < count; ++token) some(std::integral_constant<int, 1>{}, token);
            }
    }

    template <int Rows>
    static void add_middle(const float* plain, int64_t n, int64_t period, int64_t low, int64_t high,
                           const float* strip, int64_t inner, const float* z, float* y) {
        Floats sums[Rows][2];
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i) {
            sums[i][0] = load_some(plain + i * n, low);
            sums[i][1] = high ? load_some(plain + i * n + period, high) : Floats{};
        }
        for (int64_t j = 0; j < inner; ++j) {
            const Floats first = load(strip + j * kPair), second = load(strip + j * kPair + kWidth);
#pragma GCC unroll 4
            for (int i = 0; i < Rows; ++i) {
                const Floats middle = load(z + (i * inner + j) * period);
                sums[i][0] = Isa::multiply_add(middle, first, sums[i][0]);
                sums[i][1] = Isa::multiply_add(middle, second, sums[i][1]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i) {
            store_some(y + i * n, sums[i][0], low);
            if (high) store_some(y + i * n + period, sums[i][1], high);
        }
    }
};

}  // namespace
}  // namespace d2d
