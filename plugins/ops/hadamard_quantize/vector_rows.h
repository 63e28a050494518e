// HadamardQuantize with vectors of `Width` floats, in the compiler's own vector types: one source for every
// instruction set.
//
// Bounds for DiT-XL/2, 256 tokens of 1152, one core at 3.2 GHz with 8 floats a vector and four operations a cycle:
//   bytes 256 * 1152 * (4 + 1) = 1.5 MB / 20 GB/s = 74 us; a row itself stays in the first-level cache
//   operations 256 * 1152 / 8 * (3 stages of 3 + 4 of 1, maximum 2, quantizing 5) / (4 * 3.2 G/s) = 58 us
// The stages that join neighbouring vectors are done on several vectors in registers; the order of additions is the
// definition's in any case. In an anonymous namespace: each file compiles its own copy with its own flags, and the
// linker must not merge them.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "hadamard_quantize.h"
#include "scratch.h"

namespace d2d {
namespace {

template <int Width>
struct Vectors {
    typedef float Floats __attribute__((vector_size(Width * 4)));
    typedef float HalfFloats __attribute__((vector_size(Width * 2)));
    typedef double Doubles __attribute__((vector_size(Width * 4)));
    typedef int32_t Ints __attribute__((vector_size(Width * 4)));
    typedef uint32_t Words __attribute__((vector_size(Width * 4)));
    typedef int8_t Bytes __attribute__((vector_size(Width * 4)));
};

template <int Width>
class VectorRows {
    using Floats = typename Vectors<Width>::Floats;
    using HalfFloats = typename Vectors<Width>::HalfFloats;
    using Doubles = typename Vectors<Width>::Doubles;
    using Ints = typename Vectors<Width>::Ints;
    using Bytes = typename Vectors<Width>::Bytes;

  public:
    // Codes q and step s of one row x of K values, a multiple of Width; t [K] is where its rotation goes: x itself or
    // memory apart from it.
    static void quantize_row(const RowQuantization& by, const float* x, float* t, int64_t k, float qmax,
                             int8_t* q, float* s) {
        transform(x, k, by.block, t);
        const float statistic = by.gaussian ? root_mean_square(t, k) : largest(t, k);
        const RowScale found = row_scale(statistic, qmax, by.gaussian, by.mid_rise, by.norm);
        *s = found.s;
        by.mid_rise ? quantize<odd_codes>(t, k, found.scale, qmax, q)
                    : quantize<codes>(t, k, found.scale, qmax, q);
    }

    static Floats load(const float* from) {
        Floats value;
        std::memcpy(&value, from, sizeof(value));
        return value;
    }

    static void store(float* to, const Floats& value) { std::memcpy(to, &value, sizeof(value)); }

    // Half a vector of floats as doubles.
    static Doubles widened(const float* from) {
        HalfFloats half;
        std::memcpy(&half, from, sizeof(half));
        return __builtin_convertvector(half, Doubles);
    }

    static double total(const Doubles& sums) {
        double sum = 0;
        for (int i = 0; i < Width / 2; ++i) sum += sums[i];
        return sum;
    }

  private:
    using Lanes = std::make_integer_sequence<int, Width>;

    // A stage inside a vector: the partner of lane i is lane i ^ H; a - b in an upper lane is partner + (-own).
    template <int H, int... I>
    static Floats inner_stage(const Floats& own, std::integer_sequence<int, I...>) {
        constexpr auto sign = static_cast<int32_t>(0x80000000u);
        const Ints partner = {(I ^ H)...}, flip = {(I & H ? sign : 0)...};
        return __builtin_shuffle(own, partner) + reinterpret_cast<Floats>(reinterpret_cast<Ints>(own) ^ flip);
    }

    template <int H>
    static Floats inner_stages(const Floats& own, int64_t block) {
        if constexpr (H < Width) {
            if (block > H) return inner_stages<2 * H>(inner_stage<H>(own, Lanes{}), block);
        }
        return own;
    }

    // All stages of `block` that stay within Count neighbouring vectors.
    template <int Count>
    static void joined(const float* x, int64_t k, int64_t block, float* t) {
        for (int64_t start = 0; start < k; start += Count * Width) {
            Floats v[Count];
#pragma GCC unroll 8
            for (int i = 0; i < Count; ++i) v[i] = inner_stages<1>(load(x + start + i * Width), block);
#pragma GCC unroll 3
            for (int h = 1; h < Count; h *= 2)
#pragma GCC unroll 8
                for (int i = 0; i < Count; ++i)
                    if (!(i & h)) {
                        const Floats a = v[i], b = v[i + h];
                        v[i] = a + b;
                        v[i + h] = a - b;
                    }
#pragma GCC unroll 8
            for (int i = 0; i < Count; ++i) store(t + start + i * Width, v[i]);
        }
    }

    static void transform(const float* x, int64_t k, int64_t block, float* t) {
        if (block == 1) {
            std::memmove(t, x, static_cast<size_t>(k) * sizeof(float));
            return;
        }
        const int64_t vectors = block / Width;
        if (vectors >= 8)
            joined<8>(x, k, block, t);
        else if (vectors == 4)
            joined<4>(x, k, block, t);
        else if (vectors == 2)
            joined<2>(x, k, block, t);
        else
            joined<1>(x, k, block, t);
        for (int64_t h = 8 * Width; h < block; h *= 2)
            for (int64_t start = 0; start < k; start += 2 * h)
                for (int64_t i = start; i < start + h; i += Width) {
                    const Floats a = load(t + i), b = load(t + i + h);
                    store(t + i, a + b);
                    store(t + i + h, a - b);
                }
    }

    // Magnitudes are ordered as their bits are, and NaN and inf come last: a maximum of integers loses
    // neither. Two maxima, so that one need not wait for the other.
    static float largest(const float* t, int64_t k) {
        Ints most[2] = {};
        for (int64_t i = 0; i < k; i += Width) {
            Ints& so_far = most[i / Width % 2];
            const Ints magnitude = reinterpret_cast<Ints>(load(t + i)) & 0x7fffffff;
            so_far = magnitude > so_far ? magnitude : so_far;
        }
        int32_t bits = 0;
        for (int i = 0; i < Width; ++i)
            for (const Ints& one : most) bits = one[i] > bits ? one[i] : bits;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }

    // In float64: another order of the additions shows in the float32 result of next to no row,
    // unless its large terms cancel.
    static float root_mean_square(const float* t, int64_t k) {
        Doubles low{}, high{};
        for (int64_t i = 0; i < k; i += Width) {
            const Doubles first = widened(t + i), second = widened(t + i + Width / 2);
            low += first * first;
            high += second * second;
        }
        return static_cast<float>(std::sqrt(total(low + high) / static_cast<double>(k)));
    }

    // The codes of one vector, in the low bytes: adding 1.5 * 2**23 rounds half to even and leaves the integer there.
    static Ints codes(const float* t, float scale, float top) {
        const Floats high = top - Floats{}, low = -high;
        Floats value = load(t) * scale;
        value = value > high ? high : value;
        value = value < low ? low : value;
        return reinterpret_cast<Ints>(value + 12582912.0f) & 255;
    }

    // The same for a mid-rise grid. |t| is at most sqrt(K) root mean squares: the conversion cannot overflow. It cuts
    // towards zero; the comparison gives -1 where that was upwards.
    static Ints odd_codes(const float* t, float scale, float top) {
        const Ints high = static_cast<int32_t>(top) - Ints{}, low = -high;
        const Floats value = load(t) * scale;
        const Ints cut = __builtin_convertvector(value, Ints);
        const Ints below = cut + (__builtin_convertvector(cut, Floats) > value);
        Ints odd = 2 * below + 1;
        odd = odd > high ? high : odd;
        odd = odd < low ? low : odd;
        return odd & 255;
    }

    // Byte b of word w of `v` to where byte w of word b of its own 16 bytes was; then words of equal place together.
    template <int... I, int... J>
    static Bytes in_order(const Ints& v, std::integer_sequence<int, I...>, std::integer_sequence<int, J...>) {
        const Bytes transposed = {static_cast<int8_t>(I / 16 * 16 + I % 4 * 4 + I / 4 % 4)...};
        const Ints gathered = {(J % (Width / 4) * 4 + J / (Width / 4))...};
        const Bytes in_lanes = __builtin_shuffle(reinterpret_cast<Bytes>(v), transposed);
        return reinterpret_cast<Bytes>(__builtin_shuffle(reinterpret_cast<Ints>(in_lanes), gathered));
    }

    template <Ints (*Codes)(const float*, float, float)>
    static void quantize(const float* t, int64_t k, float scale, float qmax, int8_t* q) {
        if (scale == 0) {
            std::memset(q, 0, static_cast<size_t>(k));
            return;
        }
        // Codes are integers: a qmax between two allows what the lower one allows.
        const float top = std::floor(qmax);
        int64_t i = 0;
        for (; i + 4 * Width <= k; i += 4 * Width) {
            const Ints four = Codes(t + i, scale, top) | Codes(t + i + Width, scale, top) << 8 |
                              Codes(t + i + 2 * Width, scale, top) << 16 |
                              Codes(t + i + 3 * Width, scale, top) << 24;
            const Bytes bytes = in_order(four, std::make_integer_sequence<int, 4 * Width>{}, Lanes{});
            std::memcpy(q + i, &bytes, sizeof(bytes));
        }
        for (; i < k; i += Width) {
            const Ints one = Codes(t + i, scale, top);
            for (int lane = 0; lane < Width; ++lane) q[i + lane] = static_cast<int8_t>(one[lane]);
        }
    }
};

template <int Width>
class VectorKernel : public CpuKernel {
  public:
    explicit VectorKernel(const Attributes& attributes)
        : quantization_(attributes), portable_(make_hadamard_quantize_portable(attributes)) {}

    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const int64_t m = inputs[0].shape.rows(), k = inputs[0].shape.last();
        if (m == 0 || k % Width) return portable_->run(inputs, outputs, parallel);
        const int64_t rows_a_qmax = m / inputs[1].shape.count();
        parallel.run(static_cast<size_t>((m + kRows - 1) / kRows), [&](size_t task) {
            auto* t = scratch<float>(static_cast<size_t>(k));
            const int64_t first = static_cast<int64_t>(task) * kRows,
                          last = first + kRows < m ? first + kRows : m;
            for (int64_t row = first; row < last; ++row)
                VectorRows<Width>::quantize_row(quantization_, inputs[0].as<float>() + row * k, t, k,
                                                inputs[1].as<float>()[row / rows_a_qmax],
                                                outputs[0].as<int8_t>() + row * k,
                                                outputs[1].as<float>() + row);
        });
    }

  private:
    static constexpr int64_t kRows = 8;  // a task

    RowQuantization quantization_;
    std::unique_ptr<CpuKernel> portable_;
};

}  // namespace
}  // namespace d2d
