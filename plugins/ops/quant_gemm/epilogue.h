// What all fast CPU kernels do with their integers: scales, bias, branch, and y, 16 outputs of a token at a time.
//
// In an anonymous namespace: each instruction set's file compiles its own copy with its own flags, and the
// linker must not merge them.
#pragma once

#include <cstring>

#include "layout.h"
#include "quant_gemm.h"

namespace d2d {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Half of 16 outputs, in the compiler's own vector types. Copied, since mapped weights and y lie at any
// address.
typedef uint64_t Bits __attribute__((vector_size(32)));
typedef int16_t Words __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));

template <class Vector, class T>
inline Vector load_half(const T* from, int half) {
    Vector value;
    std::memcpy(&value, reinterpret_cast<const char*>(from) + half * sizeof(value), sizeof(value));
    return value;
}

template <class Vector, class T>
inline void store_half(T* to, int half, const Vector& value) {
    std::memcpy(reinterpret_cast<char*>(to) + half * sizeof(value), &value, sizeof(value));
}

// What the epilogue needs of a tile, 16 outputs side by side and zeros beyond N.
struct TileScales {
    const float* ws;    // [groups][16]
    const float* bias;  // [16]
    const float* up;    // [rank][16]
};

inline int64_t scales_size(const GemmProblem& p) { return (p.groups + 1 + p.rank) * kTile; }

inline TileScales scales_of(const GemmProblem& p, int64_t tile, float* values) {
    float* const bias = values + p.groups * kTile;
    float* const up = bias + kTile;
    std::memset(values, 0, static_cast<size_t>(scales_size(p)) * sizeof(float));
    for (int64_t i = 0; i < least(kTile, p.n - tile * kTile); ++i) {
        const int64_t n = tile * kTile + i;
        for (int64_t group = 0; group < p.groups; ++group)
            values[group * kTile + i] = p.ws[n * p.groups + group];
        bias[i] = p.bias[n];
        for (int64_t r = 0; r < p.rank; ++r) up[r * kTile + i] = p.up[n * p.rank + r];
    }
    return {values, bias, up};
}

// Adds the exact sums of half a tile of token m, group `group`, to y; after the last group come s, bias and
// the branch. y[.., tile] is at `to`, or a copy of it.
inline void finish_half(const GemmProblem& p, const TileScales& scales, int64_t group, int64_t m, int half,
                        const Ints& exact, float* to) {
    Floats y = __builtin_convertvector(exact, Floats) * load_half<Floats>(scales.ws + group * kTile, half);
    if (group) y = load_half<Floats>(to, half) + y;
    if (group + 1 == p.groups) {
        y = y * p.s[m] + load_half<Floats>(scales.bias, half);
        for (int64_t r = 0; r < p.rank; ++r)
            y += p.t[m * p.rank + r] * load_half<Floats>(scales.up + r * kTile, half);
    }
    store_half(to, half, y);
}

inline void finish_tile(const GemmProblem& p, const TileScales& scales, int64_t tile, int64_t group,
                        int64_t m, const Ints& low, const Ints& high) {
    const int64_t outputs = least(kTile, p.n - tile * kTile);
    float* const y = p.y + m * p.n + tile * kTile;
    const auto finish_to = [&](float* to) {
        finish_half(p, scales, group, m, 0, low, to);
        finish_half(p, scales, group, m, 1, high, to);
    };
    if (outputs == kTile) return finish_to(y);
    float row[kTile] = {};
    const auto bytes = static_cast<size_t>(outputs) * sizeof(float);
    if (group) std::memcpy(row, y, bytes);
    finish_to(row);
    std::memcpy(y, row, bytes);
}

}  // namespace
}  // namespace d2d
