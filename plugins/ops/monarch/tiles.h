// MonarchAdd with vectors of an instruction set: one source for all, in the compiler's own vector types.
//
// Bounds for DiT-XL/2 fc1, 256 tokens, K 1152, N 4608, a 4 x 4 grid of rank 4 (as many parameters as rank 16), one core
// at 3.2 GHz with two multiply-adds of 8 floats a cycle:
//   operations 256 * 4 * (4 * 1152 + 4 * 4608) = 23.6 M multiply-adds / 51.2 G/s           = 0.46 ms
//   bytes 256 * 4 * (1152 + 2 * 4608) + 92160 * 4 = 11.0 MB / 20 GB/s                      = 0.55 ms  <- the bound
// So: on both bounds, and two MatMuls with their transposes would move the outputs four times. A task is two vectors of
// tokens. Tokens are lanes: both halves of the branch are then one product of a row-major factor with a panel
// [inner, tokens], whatever the block's size, and the permutation between them is where a row of z is stored. Turning x
// and y to panels and back costs a few shuffles a value, once.
//
// In an anonymous namespace: each file compiles its own copy with its own flags, and the linker must not merge them.
#pragma once

#include <cstring>
#include <utility>

#include "monarch.h"
#include "scratch.h"

namespace d2d {
namespace {

template <int Width>
struct Vectors {
    typedef float Floats __attribute__((vector_size(Width * 4)));
    typedef int32_t Ints __attribute__((vector_size(Width * 4)));
};

// `Isa`: kWidth floats a vector, and multiply_add(a, b, c) = a * b + c with one rounding.
template <class Isa>
class TiledMonarch : public CpuKernel {
    static constexpr int kWidth = Isa::kWidth;
    static constexpr int64_t kTokens = 2 * kWidth;
    static constexpr int64_t kColumns = 64;  // of y at once, about: a panel stays in the first-level cache
    static constexpr int kRows = 4;  // of a factor side by side: 8 sums hide the latency of multiply-adds
    using Floats = typename Vectors<kWidth>::Floats;
    using Ints = typename Vectors<kWidth>::Ints;
    using Lanes = std::make_integer_sequence<int, kWidth>;
    enum Slot { kPanel, kMiddle, kOut };

  public:
    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const MonarchProblem p(inputs, outputs);
        parallel.run(static_cast<size_t>((p.m + kTokens - 1) / kTokens), [&](size_t task) {
            const int64_t first = static_cast<int64_t>(task) * kTokens;
            const int64_t count = p.m - first < kTokens ? p.m - first : kTokens;
            float* z = scratch<float>(static_cast<size_t>(p.values() * kTokens), kMiddle);
            go_down(p, p.x + first * p.k, count, z);
            go_up(p, p.plain + first * p.n, p.y + first * p.n, count, z);
        });
    }

  private:
    static Floats load(const float* from) {
        Floats value;
        std::memcpy(&value, from, sizeof(value));
        return value;
    }

    static void store(float* to, const Floats& value) { std::memcpy(to, &value, sizeof(value)); }

    static void go_down(const MonarchProblem& p, const float* x, int64_t count, float* z) {
        float* panel = scratch<float>(static_cast<size_t>(p.width * kTokens), kPanel);
        std::memset(z, 0, static_cast<size_t>(p.values() * kTokens) * sizeof(float));
        for (int64_t a = 0; a < p.blocks_in; ++a) {
            to_panel(x + a * p.width, p.k, count, p.width, panel);
            add_product(p.down + a * p.rows_down() * p.width, p.rows_down(), p.width, panel,
                        [&](int64_t row) { return z + p.place(a, row) * kTokens; });
        }
    }

    static void go_up(const MonarchProblem& p, const float* plain, float* y, int64_t count, const float* z) {
        // Rows of a block at once: a multiple of a vector, so that only the last columns are a tail.
        const int64_t strips = kColumns / (kWidth * p.blocks_out), rows = kWidth * (strips > 1 ? strips : 1);
        float* panel = scratch<float>(static_cast<size_t>(rows * p.blocks_out * kTokens), kOut);
        for (int64_t row = 0; row < p.height; row += rows) {
            const int64_t some = p.height - row < rows ? p.height - row : rows, column = row * p.blocks_out;
            to_panel(plain + column, p.n, count, some * p.blocks_out, panel);
            for (int64_t b = 0; b < p.blocks_out; ++b)
                add_product(p.up + (b * p.height + row) * p.inner(), some, p.inner(),
                            z + b * p.inner() * kTokens,
                            [&](int64_t at) { return panel + (at * p.blocks_out + b) * kTokens; });
            from_panel(panel, some * p.blocks_out, count, y + column, p.n);
        }
    }

    // Adds factor [rows, inner] times panel [inner, tokens] to the rows of tokens that `to` gives.
    template <class To>
    static void add_product(const float* factor, int64_t rows, int64_t inner, const float* panel,
                            const To& to) {
        int64_t row = 0;
        for (; row + kRows <= rows; row += kRows) add_rows<kRows>(factor, row, inner, panel, to);
        for (; row < rows; ++row) add_rows<1>(factor, row, inner, panel, to);
    }

    template <int Rows, class To>
    static void add_rows(const float* factor, int64_t row, int64_t inner, const float* panel, const To& to) {
        Floats sums[Rows][2];
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i)
            for (int v = 0; v < 2; ++v) sums[i][v] = load(to(row + i) + v * kWidth);
        const float* from = factor + row * inner;
        for (int64_t j = 0; j < inner; ++j) {
            const Floats low = load(panel + j * kTokens), high = load(panel + j * kTokens + kWidth);
#pragma GCC unroll 4
            for (int i = 0; i < Rows; ++i) {
                const Floats one = from[i * inner + j] - Floats{};
                sums[i][0] = Isa::multiply_add(one, low, sums[i][0]);
                sums[i][1] = Isa::multiply_add(one, high, sums[i][1]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i)
            for (int v = 0; v < 2; ++v) store(to(row + i) + v * kWidth, sums[i][v]);
    }

    // One stage of the transposition: blocks of H x H off the diagonal change places.
    template <int H, int... I>
    static void exchange(Floats* v, std::integer_sequence<int, I...>) {
        const Ints upper = {(I & H ? kWidth + I - H : I)...}, lower = {(I & H ? kWidth + I : I + H)...};
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
            if (!(i & H)) {
                const Floats a = v[i], b = v[i + H];
                v[i] = __builtin_shuffle(a, b, upper);
                v[i + H] = __builtin_shuffle(a, b, lower);
            }
    }

    static void transpose(Floats* v) {
        exchange<1>(v, Lanes{});
        exchange<2>(v, Lanes{});
        exchange<4>(v, Lanes{});
        if constexpr (kWidth > 8) exchange<8>(v, Lanes{});
    }

    // Columns [0, columns) of `count` tokens to rows of kTokens floats; tokens that are not there are zeros.
    static void to_panel(const float* from, int64_t stride, int64_t count, int64_t columns, float* panel) {
        for (int half = 0; half < 2; ++half) {
            const int64_t first = half * kWidth;
            int64_t c = 0;
            for (; c + kWidth <= columns; c += kWidth) {
                Floats v[kWidth];
#pragma GCC unroll 16
                for (int i = 0; i < kWidth; ++i)
                    v[i] = first + i < count ? load(from + (first + i) * stride + c) : Floats{};
                transpose(v);
#pragma GCC unroll 16
                for (int i = 0; i < kWidth; ++i) store(panel + (c + i) * kTokens + first, v[i]);
            }
            for (; c < columns; ++c)
                for (int64_t t = first; t < first + kWidth; ++t)
                    panel[c * kTokens + t] = t < count ? from[t * stride + c] : 0.0f;
        }
    }

    static void from_panel(const float* panel, int64_t columns, int64_t count, float* to, int64_t stride) {
        for (int half = 0; half < 2; ++half) {
            const int64_t first = half * kWidth;
            int64_t c = 0;
            for (; c + kWidth <= columns; c += kWidth) {
                Floats v[kWidth];
#pragma GCC unroll 16
                for (int i = 0; i < kWidth; ++i) v[i] = load(panel + (c + i) * kTokens + first);
                transpose(v);
#pragma GCC unroll 16
                for (int i = 0; i < kWidth; ++i)
                    if (first + i < count) store(to + (first + i) * stride + c, v[i]);
            }
            for (; c < columns; ++c)
                for (int64_t t = first; t < first + kWidth && t < count; ++t)
                    to[t * stride + c] = panel[c * kTokens + t];
        }
    }
};

}  // namespace
}  // namespace d2d
