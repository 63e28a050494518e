// ActivationHadamardQuantize with vectors of `Width` floats: one source for every instruction set, around HadamardQuantize's.
//
// Bounds for DiT-XL/2, 256 tokens of 4608, one core at 3.2 GHz with 8 floats a vector and four operations a cycle:
//   bytes 256 * 4608 * (4 + 1, with y 4 more) = 5.9 (10.6) MB / 20 GB/s = 295 (531) us; a row stays in the first cache
//   operations 256 * 4608 / 8 * (GELU 27 and a division of 5 cycles, HadamardQuantize's 22) / (4 * 3.2 G/s) = 740 us
// What it replaces writes and reads the activated row once more. In an anonymous namespace, as vector_rows.h is, and
// for its reason.
#pragma once

#include "activation.h"
#include "activation_hadamard_quantize.h"
#include "hadamard_quantize/vector_rows.h"

namespace d2d {
namespace {

template <int Width>
struct ActivationVectorRows {
    using Rows = VectorRows<Width>;
    using Floats = typename Vectors<Width>::Floats;
    using Words = typename Vectors<Width>::Words;

    static void activate(const float* x, int64_t k, float* y) {
        for (int64_t i = 0; i < k; i += Width) Rows::store(y + i, gelu<Floats, Words>(Rows::load(x + i)));
    }

    static ActivationRows rows() { return {Width, activate, Rows::quantize_row}; }
};

}  // namespace
}  // namespace d2d
