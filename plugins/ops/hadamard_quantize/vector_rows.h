// HadamardQuantize with vectors of `Width` floats, in the compiler's own vector types: one source for every
// instruction set.
//
// Bounds for DiT-XL/2, 256 tokens of 1152, one core at 2.6 GHz with 8 floats a vector and two adds a cycle:
//   bytes 256 * 1152 * (4 + 1) = 1.5 MB / 20 GB/s = 74 us; a row itself stays in the first-level cache
//   operations 256 * 1152 * (7 stages + about 6) / (16 * 2.6 G/s) = 92 us
// In an anonymous namespace: each file compiles its own copy with its own flags, and the linker must not
// merge them.
#pragma once

#include <cstring>

#include "hadamard_quantize.h"
#include "scratch.h"

namespace d2d {
namespace {

template <int Width>
struct Vectors {
    typedef float Floats __attribute__((vector_size(Width * 4), aligned(4)));
    typedef int32_t Ints __attribute__((vector_size(Width * 4), aligned(4)));
    typedef double Doubles __attribute__((vector_size(Width * 8), aligned(8)));
    typedef int8_t Bytes __attribute__((vector_size(Width), aligned(1)));
};

template <int Width>
class VectorKernel : public CpuKernel {
    using Floats = typename Vectors<Width>::Floats;
    using Ints = typename Vectors<Width>::Ints;
    using Doubles = typename Vectors<Width>::Doubles;
    using Bytes = typename Vectors<Width>::Bytes;

  public:
    explicit VectorKernel(const Attributes& attributes)
        : block_(attributes.integer("block")),
          gaussian_(attributes.text("clip") == "gaussian"),
          portable_(make_hadamard_quantize_portable(attributes)) {}

    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const int64_t m = inputs[0].shape.rows(), k = inputs[0].shape.last();
        if (m == 0 || k % Width) return portable_->run(inputs, outputs, parallel);
        const int64_t rows_a_qmax = m / inputs[1].shape.count();
        const float norm = hadamard_norm(block_);
        parallel.run(static_cast<size_t>((m + kRows - 1) / kRows), [&](size_t task) {
            auto* t = scratch<Floats>(static_cast<size_t>(k / Width));
            const int64_t first = static_cast<int64_t>(task) * kRows,
                          last = first + kRows < m ? first + kRows : m;
            for (int64_t row = first; row < last; ++row) {
                std::memcpy(t, inputs[0].as<float>() + row * k, static_cast<size_t>(k) * 4);
                transform(t, k / Width);
                const float qmax = inputs[1].as<float>()[row / rows_a_qmax];
                const float statistic = gaussian_ ? root_mean_square(t, k) : largest(t, k / Width);
                const RowScale found = row_scale(statistic, qmax, gaussian_, norm);
                outputs[1].as<float>()[row] = found.s;
                quantize(t, k / Width, found.scale, qmax, outputs[0].as<int8_t>() + row * k);
            }
        });
    }

  private:
    static constexpr int64_t kRows = 8;  // a task

    // Stages inside a vector: the partner of lane i is lane i ^ h; a - b in an upper lane is partner +
    // (-own).
    template <int H>
    static void inner_stage(Floats* t, int64_t count) {
        Ints partner, flip;
        for (int i = 0; i < Width; ++i) {
            partner[i] = i ^ H;
            flip[i] = i & H ? static_cast<int32_t>(0x80000000u) : 0;
        }
        for (int64_t i = 0; i < count; ++i)
            t[i] = __builtin_shuffle(t[i], partner) +
                   reinterpret_cast<Floats>(reinterpret_cast<Ints>(t[i]) ^ flip);
    }

    void transform(Floats* t, int64_t count) const {
        if (block_ > 1) inner_stage<1>(t, count);
        if (block_ > 2) inner_stage<2>(t, count);
        if (block_ > 4) inner_stage<4>(t, count);
        if constexpr (Width > 8)
            if (block_ > 8) inner_stage<8>(t, count);
        for (int64_t h = 1; h < block_ / Width; h *= 2)
            for (int64_t start = 0; start < count; start += 2 * h)
                for (int64_t i = start; i < start + h; ++i) {
                    const Floats a = t[i], b = t[i + h];
                    t[i] = a + b;
                    t[i + h] = a - b;
                }
    }

    // Magnitudes are ordered as their bits are, and NaN and inf come last: a maximum of integers loses
    // neither.
    static float largest(const Floats* t, int64_t count) {
        Ints most{};
        for (int64_t i = 0; i < count; ++i) {
            const Ints magnitude = reinterpret_cast<Ints>(t[i]) & 0x7fffffff;
            most = magnitude > most ? magnitude : most;
        }
        int32_t bits = 0;
        for (int i = 0; i < Width; ++i) bits = most[i] > bits ? most[i] : bits;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }

    // In float64, so that every order of the additions rounds to the same float32.
    static float root_mean_square(const Floats* t, int64_t k) {
        Doubles sums{};
        for (int64_t i = 0; i < k / Width; ++i) {
            const Doubles wide = __builtin_convertvector(t[i], Doubles);
            sums += wide * wide;
        }
        double sum = 0;
        for (int i = 0; i < Width; ++i) sum += sums[i];
        return static_cast<float>(std::sqrt(sum / static_cast<double>(k)));
    }

    static void quantize(const Floats* t, int64_t count, float scale, float qmax, int8_t* q) {
        if (scale == 0) {
            std::memset(q, 0, static_cast<size_t>(count * Width));
            return;
        }
        const Floats top = qmax - Floats{}, bottom = -top;
        const float magic = 12582912.0f;  // 1.5 * 2**23: adding it rounds half to even
        for (int64_t i = 0; i < count; ++i) {
            Floats value = t[i] * scale;
            value = value > top ? top : value;
            value = value < bottom ? bottom : value;
            value = (value + magic) - magic;
            const Bytes codes = __builtin_convertvector(__builtin_convertvector(value, Ints), Bytes);
            std::memcpy(q + i * Width, &codes, Width);
        }
    }

    int64_t block_;
    bool gaussian_;
    std::unique_ptr<CpuKernel> portable_;
};

}  // namespace
}  // namespace d2d
