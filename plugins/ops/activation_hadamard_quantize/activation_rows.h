// ActivationHadamardQuantize with vectors of `Width` floats: one source for every instruction set, around
// HadamardQuantize's.
//
// Bounds for one core at 3.2 GHz with 8 floats a vector and four operations a cycle. GELU of DiT-XL/2, 256 tokens of 4608:
//   bytes 256 * 4608 * (4 + 1, with y 4 more) = 5.9 (10.6) MB / 20 GB/s = 295 (531) us; a row stays in the first cache
//   operations 256 * 4608 / 8 * (GELU 27 and a division of 5 cycles, HadamardQuantize's 22) / (4 * 3.2 G/s) = 795 us
// SiLU and a factor, Z-Image, 1024 tokens of 10240:
//   bytes 1024 * 10240 * (4 + 4 + 1, with y 4 more) = 94 (136) MB / 20 GB/s = 4.7 (6.8) ms
//   operations 1024 * 10240 / 8 * (SiLU 24 and a division of 5 cycles, the factor, 22) / (4 * 3.2 G/s) = 6.9 ms
// What it replaces moves 8 bytes a value more, of SiLU and a factor (Sigmoid, two Muls) 28. In an anonymous namespace, as
// vector_rows.h is, and for its reason.
#pragma once

#include "activation_hadamard_quantize.h"
#include "hadamard_quantize/vector_rows.h"

namespace d2d {
namespace {

template <int Width>
struct ActivationVectorRows {
    using Rows = VectorRows<Width>;
    using Floats = typename Vectors<Width>::Floats;
    using Words = typename Vectors<Width>::Words;

    static void activate(Activation activation, const float* x, const float* factor, int64_t k, float* y) {
        for (int64_t i = 0; i < k; i += Width) {
            const Floats active = activated<Floats, Words>(activation, Rows::load(x + i));
            Rows::store(y + i, factor ? active * Rows::load(factor + i) : active);
        }
    }

    static ActivationRows rows() { return {Width, activate, Rows::quantize_row}; }
};

}  // namespace
}  // namespace d2d
