// What the NEON kernels share: signed weights of a quad, and the 4 activations that they meet.
//
// In an anonymous namespace, for the reason that epilogue.h gives.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "layout.h"

namespace d2d {
namespace {

// The codes of 16 outputs; `Centred`: weights of int8, whose codes are too large for a signed byte.
struct Codes {
    int8x16_t of[4];
};

template <bool Centred>
inline Codes load_codes(const uint8_t* from) {
    Codes codes;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
        const uint8x16_t stored = vld1q_u8(from + 16 * v);
        codes.of[v] = vreinterpretq_s8_u8(Centred ? veorq_u8(stored, vdupq_n_u8(128)) : stored);
    }
    return codes;
}

// 4 bytes, four times.
inline int8x16_t broadcast(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

}  // namespace
}  // namespace d2d
