// What all fast CPU kernels do with their integers: scales, bias, branch, gate and residual, and y, 16 outputs of a token
// at a time.
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

// 16 outputs, or half of them where vectors are no longer, in the compiler's own vector types. Copied, since mapped weights
// and y lie at any address.
#if defined(__AVX512BW__)
constexpr int kPartBytes = 64;
#else
constexpr int kPartBytes = 32;
#endif
constexpr int kParts = 64 / kPartBytes;
typedef uint64_t Bits __attribute__((vector_size(kPartBytes)));
typedef int16_t Words __attribute__((vector_size(kPartBytes)));
typedef int32_t Ints __attribute__((vector_size(kPartBytes)));
typedef float Floats __attribute__((vector_size(kPartBytes)));
struct TileSums {
    Ints part[kParts];
};

template <class Vector, class T>
inline Vector load_part(const T* from, int part) {
    Vector value;
    std::memcpy(&value, reinterpret_cast<const char*>(from) + part * sizeof(value), sizeof(value));
    return value;
}

template <class Vector, class T>
inline void store_part(T* to, int part, const Vector& value) {
    std::memcpy(reinterpret_cast<char*>(to) + part * sizeof(value), &value, sizeof(value));
}

// What the epilogue needs of a tile, 16 outputs side by side and zeros beyond N.
struct TileScales {
    const float* ws;    // [groups][16]
    const float* bias;  // [16]
    const float* up;    // [rank][16]
    int64_t first_rank,
        last_rank;  // rows of `up` outside are zeros: of joined layers, each has a branch of its own
};

inline bool has_branch(const TileScales& scales) { return scales.first_rank < scales.last_rank; }

inline int64_t scales_size(const GemmProblem& p) { return (p.groups + 1 + p.rank) * kTile; }

inline TileScales scales_of(const GemmProblem& p, int64_t tile, float* values) {
    float* const bias = values + p.groups * kTile;
    float* const up = bias + kTile;
    std::memset(values, 0, static_cast<size_t>(scales_size(p)) * sizeof(float));
    int64_t first = p.rank, last = 0;
    for (int64_t i = 0; i < least(kTile, p.n - tile * kTile); ++i) {
        const int64_t n = tile * kTile + i;
        for (int64_t group = 0; group < p.groups; ++group)
            values[group * kTile + i] = p.ws[n * p.groups + group];
        bias[i] = p.bias[n];
        const float* const own = p.up + n * p.rank;
        int64_t begin = 0, end = p.rank;
        while (begin < end && own[begin] == 0) ++begin;
        while (begin < end && own[end - 1] == 0) --end;
        for (int64_t r = begin; r < end; ++r) up[r * kTile + i] = own[r];
        if (begin < end) {
            first = least(first, begin);
            last = end > last ? end : last;
        }
    }
    return {values, bias, up, first, last};
}

// Of a token and a tile: where 16 values of residual and gate are, nullptr where y takes none (yet).
struct Stream {
    const float* residual;
    const float* gate;

    Stream from(int64_t outputs) const {
        return {residual ? residual + outputs : nullptr, gate ? gate + outputs : nullptr};
    }
    Floats joined(int part, const Floats& y) const {
        return residual ? load_part<Floats>(residual, part) + load_part<Floats>(gate, part) * y : y;
    }
};

inline Stream stream_of(const GemmProblem& p, int64_t tile, int64_t m) {
    if (!p.residual) return {nullptr, nullptr};
    const auto gate = static_cast<uint32_t>(m) / static_cast<uint32_t>(p.tokens_a_gate);
    return {p.residual + m * p.n + tile * kTile, p.gate + gate * p.n + tile * kTile};
}

// The tile at N's border: copies of `outputs` values, zeros beyond.
struct BorderTile {
    float row[kTile] = {}, residual[kTile] = {}, gate[kTile] = {};
    Stream stream;
    size_t bytes;

    BorderTile(const Stream& of, int64_t outputs)
        : stream{of.residual ? residual : nullptr, gate},
          bytes(static_cast<size_t>(outputs) * sizeof(float)) {
        if (!of.residual) return;
        std::memcpy(residual, of.residual, bytes);
        std::memcpy(gate, of.gate, bytes);
    }
};

// Adds the exact sums of a tile of token m, group `group`, to y; after the last group come s and bias, and gate and
// residual unless a branch is added first. y[.., tile] is at `to`, or a copy of it.
inline void finish(const GemmProblem& p, const TileScales& scales, int64_t group, int64_t m,
                   const TileSums& sums, const Stream& stream, float* to) {
    const float* const ws = scales.ws + group * kTile;
    const float s = p.s[m];
    for (int i = 0; i < kParts; ++i) {
        Floats y = __builtin_convertvector(sums.part[i], Floats) * load_part<Floats>(ws, i);
        if (group) y = load_part<Floats>(to, i) + y;
        if (group + 1 == p.groups) y = stream.joined(i, y * s + load_part<Floats>(scales.bias, i));
        store_part(to, i, y);
    }
}

inline void finish_tile(const GemmProblem& p, const TileScales& scales, int64_t tile, int64_t group,
                        int64_t m, const TileSums& sums) {
    const int64_t outputs = least(kTile, p.n - tile * kTile);
    float* const y = p.y + m * p.n + tile * kTile;
    const bool is_last = group + 1 == p.groups && !has_branch(scales);
    const Stream stream = is_last ? stream_of(p, tile, m) : Stream{};
    if (outputs == kTile) return finish(p, scales, group, m, sums, stream, y);
    BorderTile border(stream, outputs);
    if (group) std::memcpy(border.row, y, border.bytes);
    finish(p, scales, group, m, sums, border.stream, border.row);
    std::memcpy(y, border.row, border.bytes);
}

// `count` tiles of a token: sums_of(i, part) gives the exact sums of tile i. What they share is copied first, since a store
// of a vector may alias anything.
template <class SumsOf>
inline void finish_tiles(const GemmProblem& p, const TileScales* scales, int64_t tile, int64_t count,
                         int64_t group, int64_t m, const SumsOf& sums_of) {
    int64_t i = 0;
    if (p.groups == 1) {
        const int64_t whole = least(count, p.n / kTile - tile);
        const float s = p.s[m];
        float* const y = p.y + m * p.n + tile * kTile;
        const Stream stream = stream_of(p, tile, m);
        for (; i < whole; ++i) {
            const TileScales own = scales[i];
            const Stream to = has_branch(own) ? Stream{} : stream.from(i * kTile);
            for (int part = 0; part < kParts; ++part) {
                const Floats sum = __builtin_convertvector(sums_of(i, part), Floats);
                const Floats scaled = sum * load_part<Floats>(own.ws, part) * s;
                store_part(y + i * kTile, part, to.joined(part, scaled + load_part<Floats>(own.bias, part)));
            }
        }
    }
    for (; i < count; ++i) {
        TileSums sums;
        for (int part = 0; part < kParts; ++part) sums.part[part] = sums_of(i, part);
        finish_tile(p, scales[i], tile + i, group, m, sums);
    }
}

// Tokens side by side: 8 sums hide the latency of additions, and share a load of `up`.
constexpr int64_t kBranchTokens = 4;

template <int Tokens>
inline void add_terms(const float* t, int64_t rank, const TileScales& scales, const Stream (&streams)[Tokens],
                      float* y, int64_t stride) {
    Floats sums[Tokens][kParts];
#pragma GCC unroll 4
    for (int i = 0; i < Tokens; ++i)
        for (int part = 0; part < kParts; ++part) sums[i][part] = load_part<Floats>(y + i * stride, part);
    for (int64_t r = scales.first_rank; r < scales.last_rank; ++r)
        for (int part = 0; part < kParts; ++part) {
            const Floats up = load_part<Floats>(scales.up + r * kTile, part);
#pragma GCC unroll 4
            for (int i = 0; i < Tokens; ++i) sums[i][part] += t[i * rank + r] * up;
        }
#pragma GCC unroll 4
    for (int i = 0; i < Tokens; ++i)
        for (int part = 0; part < kParts; ++part)
            store_part(y + i * stride, part, streams[i].joined(part, sums[i][part]));
}

// Adds the branch of a tile, then gate and residual, to y of tokens [m, m + tokens), after finish_tile. (A term that is
// left out is t * 0: 0, unless t is not finite.)
inline void add_branch(const GemmProblem& p, const TileScales& scales, int64_t tile, int64_t m,
                       int64_t tokens) {
    if (!has_branch(scales)) return;
    const int64_t outputs = least(kTile, p.n - tile * kTile);
    const float* t = p.t + m * p.rank;
    float* y = p.y + m * p.n + tile * kTile;
    if (outputs == kTile)
        for (; tokens >= kBranchTokens; tokens -= kBranchTokens) {
            Stream streams[kBranchTokens];
            for (int i = 0; i < kBranchTokens; ++i) streams[i] = stream_of(p, tile, m + i);
            add_terms<kBranchTokens>(t, p.rank, scales, streams, y, p.n);
            m += kBranchTokens;
            t += kBranchTokens * p.rank;
            y += kBranchTokens * p.n;
        }
    for (; tokens; --tokens, ++m, t += p.rank, y += p.n) {
        BorderTile border(stream_of(p, tile, m), outputs);
        std::memcpy(border.row, y, border.bytes);
        add_terms<1>(t, p.rank, scales, {border.stream}, border.row, kTile);
        std::memcpy(y, border.row, border.bytes);
    }
}

}  // namespace
}  // namespace d2d
