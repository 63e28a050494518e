// AdaLnHadamardQuantize with vectors of `Width` floats: one source for every instruction set, around HadamardQuantize's.
//
// Bounds for DiT-XL/2, 256 tokens of 1152, one core at 3.2 GHz with 8 floats a vector and four operations a cycle:
//   bytes 256 * 1152 * (4 + 1, with y 4 more) = 1.5 (2.7) MB / 20 GB/s = 74 (133) us; a row stays in the first-level cache
//   operations 256 * 1152 / 8 * (two sums in float64 of 4 and 7, modulation 4, HadamardQuantize's 20) / (4 * 3.2 G/s)
//     = 101 us
// What it replaces moves 9 floats of memory a value: LayerNormalization, Mul and Add read and write, HadamardQuantize
// reads. In an anonymous namespace, as vector_rows.h is, and for its reason.
#pragma once

#include "ada_ln_hadamard_quantize.h"
#include "hadamard_quantize/vector_rows.h"

namespace d2d {
namespace {

template <int Width>
struct AdaLnVectorRows {
    using Rows = VectorRows<Width>;
    using Floats = typename Vectors<Width>::Floats;
    using Doubles = typename Vectors<Width>::Doubles;

    // Two sums of each kind, so that one addition need not wait for the other.
    static void modulate(const float* x, const float* shift, const float* scale, float eps, int64_t k,
                         float* y) {
        Doubles sums[2] = {}, squares[2] = {};
        for (int64_t i = 0; i < k; i += Width)
            for (int half = 0; half < 2; ++half) sums[half] += Rows::widened(x + i + half * Width / 2);
        const auto mean = static_cast<float>(Rows::total(sums[0] + sums[1]) / static_cast<double>(k));
        for (int64_t i = 0; i < k; i += Width) {
            Rows::store(y + i, Rows::load(x + i) - mean);
            for (int half = 0; half < 2; ++half) {
                const Doubles deviation = Rows::widened(y + i + half * Width / 2);
                squares[half] += deviation * deviation;
            }
        }
        const double variance = Rows::total(squares[0] + squares[1]) / static_cast<double>(k);
        const auto inverse = static_cast<float>(1 / std::sqrt(variance + eps));
        for (int64_t i = 0; i < k; i += Width)
            Rows::store(y + i,
                        Rows::load(y + i) * inverse * (1 + Rows::load(scale + i)) + Rows::load(shift + i));
    }

    static AdaLnRows rows() { return {Width, modulate, Rows::quantize_row}; }
};

}  // namespace
}  // namespace d2d
