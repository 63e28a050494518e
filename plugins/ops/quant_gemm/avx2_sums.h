// How the AVX2 kernels hold the sums of some tokens in registers.
//
// In an anonymous namespace, for the reason that epilogue.h gives.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "layout.h"

namespace d2d {
namespace {

// 12 sums, 2 weights, an activation and a product fill the 16 registers.
constexpr int kMostTokens = 6;

inline __m256i load(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// The sums of some tokens, as a recursion: gcc keeps members in registers, but elements of an array in
// memory.
template <int Tokens>
struct Sums {
    __m256i a = _mm256_setzero_si256(), b = _mm256_setzero_si256();
    Sums<Tokens - 1> others;

    template <class Add>
    [[gnu::always_inline]] void add(const int8_t* q, int64_t stride, __m256i first, __m256i second,
                                    const Add& one) {
        one(q, first, second, a, b);
        others.add(q + stride, stride, first, second, one);
    }

    template <class Widen>
    [[gnu::always_inline]] void add_to(int32_t* dots, const Widen& widen) const {
        auto* to = reinterpret_cast<__m256i*>(dots);
        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), widen(a)));
        _mm256_storeu_si256(to + 1, _mm256_add_epi32(_mm256_loadu_si256(to + 1), widen(b)));
        others.add_to(dots + kTile, widen);
    }
};

template <>
struct Sums<0> {
    template <class Add>
    void add(const int8_t*, int64_t, __m256i, __m256i, const Add&) {}
    template <class Widen>
    void add_to(int32_t*, const Widen&) const {}
};

// `steps` times 64 bytes of weights and 4 bytes of each token: a quad of codes, or half a quad of int16.
template <int Tokens, class Add, class Widen>
[[gnu::always_inline]] inline void add_stretch(const int8_t* q, int64_t stride, const uint8_t* weights,
                                               int64_t steps, int32_t* dots, const Add& one,
                                               const Widen& widen) {
    Sums<Tokens> sums;
    do {
        sums.add(q, stride, load(weights), load(weights + 32), one);
        weights += kVector;
        q += 4;
    } while (--steps);
    sums.add_to(dots, widen);
}

// part(std::integral_constant<int, tokens>{}), 1 .. kMostTokens.
template <class Part>
[[gnu::always_inline]] inline void with_tokens(int tokens, const Part& part) {
    switch (tokens) {
        case 6: return part(std::integral_constant<int, 6>{});
        case 5: return part(std::integral_constant<int, 5>{});
        case 4: return part(std::integral_constant<int, 4>{});
        case 3: return part(std::integral_constant<int, 3>{});
        case 2: return part(std::integral_constant<int, 2>{});
        default: return part(std::integral_constant<int, 1>{});
    }
}

}  // namespace
}  // namespace d2d
