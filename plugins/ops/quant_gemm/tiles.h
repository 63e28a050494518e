// How the fast CPU kernels walk a GEMM in layout 1: a task is a few tiles of 16 outputs; their weights are
// unpacked once for all tokens, a block of K at a time so that a tile's stay in the first-level cache; a
// micro-kernel of an instruction set adds up the integers of a few tokens; one epilogue.
//
// Everything is in an anonymous namespace: each instruction set's file compiles its own copy with its own
// flags, and the linker must not merge them.
#pragma once

#include <cstring>

#include "layout.h"
#include "quant_gemm.h"
#include "scratch.h"

namespace d2d {
namespace {

constexpr int64_t kTilesATask = 4;            // read the activations once for 64 outputs
constexpr int64_t kTokensAPart = 16;          // of a task that prepares activations
constexpr int64_t kFewActivations = 1 << 16;  // prepared before other threads would be awake
constexpr int64_t kBytesABlock =
    20480;  // of a tile's unpacked weights: the rest of 32 KiB is for activations

// Of the thread that runs a node: kPanel, kSums, which all its tasks read; of the thread that runs a task:
// the others.
enum Slot { kPanel, kSums, kWeights, kDots };

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Activations as the micro-kernel reads them, `quad` bytes for 4 neighbouring k's, K padded with zeros to
// whole quads: int8 as they are, or, beside weights of int16, int16 in the order k0 k2 k1 k3 (see
// unpack_wide).
struct Panel {
    const int8_t* rows;
    int64_t stride;
    int64_t quad;
};

inline void widen(const int8_t* q, int64_t quads, int16_t* to) {
    for (int64_t i = 0; i < quads; ++i) {
        to[4 * i] = q[4 * i];
        to[4 * i + 1] = q[4 * i + 2];
        to[4 * i + 2] = q[4 * i + 1];
        to[4 * i + 3] = q[4 * i + 3];
    }
}

inline void fill_row(const int8_t* q, int64_t k, int64_t quads, bool wide, int8_t* to) {
    if (wide) {
        auto* words = reinterpret_cast<int16_t*>(to);
        int8_t last[4] = {};
        std::memcpy(last, q + k / 4 * 4, static_cast<size_t>(k % 4));
        widen(q, k / 4, words);
        if (k % 4) widen(last, 1, words + 4 * (quads - 1));
    } else {
        std::memcpy(to, q, static_cast<size_t>(k));
        std::memset(to + k, 0, static_cast<size_t>(4 * quads - k));
    }
}

// The sum of `count` codes: in int16 over stretches that it holds, which is four times the work of a vector
// in int32.
inline int32_t sum_of(const int8_t* q, int64_t count) {
    constexpr int64_t kStretch = 128;
    int32_t sum = 0;
    int64_t k = 0;
    for (; k + kStretch <= count; k += kStretch) {
        int16_t part = 0;
        for (int64_t i = 0; i < kStretch; ++i) part = static_cast<int16_t>(part + q[k + i]);
        sum += part;
    }
    for (; k < count; ++k) sum += q[k];
    return sum;
}

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

// Codes of quads [first, first + count) of a tile: 64 bytes a quad, byte p of output p / 4 and k p % 4. Eight
// bytes are shifted as one number: what comes in from a neighbour is masked.
template <int Index>
void unpack(const uint8_t* tile, int64_t first, int64_t count, uint8_t* to) {
    constexpr ChunkShape shape = chunk_shape(kFormats[Index]);
    constexpr bool planes = Index == 1;
    constexpr int bits = planes ? 2 : 8 / shape.quads;
    constexpr uint64_t ones = 0x0101010101010101u, mask = ones * ((1 << bits) - 1);
    for (int64_t quad = first; quad < first + count; ++quad, to += kVector) {
        const uint8_t* chunk = tile + quad / shape.quads * shape.vectors * kVector;
        const int place = static_cast<int>(quad % shape.quads);
        const uint8_t* low = planes ? chunk + place / 4 * kVector : chunk;
        const int shift = bits * (planes ? place % 4 : place);
        for (int half = 0; half < 2; ++half) {
            Bits codes = load_half<Bits>(low, half) >> shift & mask;
            if constexpr (planes) codes |= (load_half<Bits>(chunk + 2 * kVector, half) >> place & ones) << 2;
            store_half(to, half, codes);
        }
    }
}

// int8 weights as int16, 128 bytes a quad: k's 0 and 2 of the 16 outputs, then k's 1 and 3. In this order two
// shifts widen them.
inline void unpack_wide(const uint8_t* tile, int64_t first, int64_t count, uint8_t* to) {
    const uint8_t* from = tile + first * kVector;
    for (int64_t quad = 0; quad < count; ++quad, from += kVector, to += 2 * kVector)
        for (int half = 0; half < 2; ++half) {
            const Words pairs =
                load_half<Words>(from, half) ^ static_cast<int16_t>(0x8080);  // code - 128, twice
            store_half(to, half, pairs << 8 >> 8);
            store_half(to + kVector, half, pairs >> 8);
        }
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

// Micro(format, bits): kTokens is the most tokens it takes at once; wide() tells whether it reads int16 (int8
// weights only); add(q, stride, weights, tokens, quads, dots) adds the exact sums of 16 outputs to
// dots[tokens][16].
template <int Index, class Micro>
class TiledGemm : public CpuKernel {
  public:
    TiledGemm(const Attributes& attributes, bool low_rank)
        : micro_(kFormat, static_cast<int>(attributes.integer("bits"))),
          low_rank_(low_rank),
          slow_(make_quant_gemm_portable(kFormat, attributes, low_rank)) {}

    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const GemmProblem p(inputs, outputs, low_rank_);
        if (p.m == 0) return;
        // A group that ends inside a quad would need the quad twice: no such size is worth it.
        if (p.groups > 1 && p.k / p.groups % 4) return slow_->run(inputs, outputs, parallel);
        const int32_t* sums = nullptr;
        const Panel panel = prepare(p, &sums, parallel);
        const int64_t tiles = (p.n + kTile - 1) / kTile;
        parallel.run(static_cast<size_t>((tiles + kTilesATask - 1) / kTilesATask), [&](size_t task) {
            const int64_t tile = static_cast<int64_t>(task) * kTilesATask;
            run_tiles(p, panel, sums, tile, least(kTilesATask, tiles - tile));
        });
    }

  private:
    static constexpr FormatSpec kFormat = kFormats[Index];
    static constexpr bool kMayBeWide = Index == 3;

    bool wide() const { return kMayBeWide && micro_.wide(); }

    // Pads and widens the activations where that is needed, and adds them up by token and group: codes are
    // weights + offset, so offset * sum is taken off. Both stay in the scratch of this thread until all tasks
    // are done.
    Panel prepare(const GemmProblem& p, const int32_t** sums, const Parallel& parallel) const {
        const int64_t quads = (p.k + 3) / 4, quad = wide() ? 8 : 4;
        int8_t* rows = nullptr;
        int32_t* totals = nullptr;
        if (wide() || p.k % 4) rows = scratch<int8_t>(static_cast<size_t>(p.m * quads * quad), kPanel);
        if (!wide()) totals = scratch<int32_t>(static_cast<size_t>(p.m * p.groups), kSums);
        const auto fill = [&](size_t part) {
            const int64_t first = static_cast<int64_t>(part) * kTokensAPart;
            const int64_t size = p.k / p.groups;
            for (int64_t m = first; m < least(p.m, first + kTokensAPart); ++m) {
                const int8_t* q = p.q + m * p.k;
                if (rows) fill_row(q, p.k, quads, wide(), rows + m * quads * quad);
                for (int64_t group = 0; totals && group < p.groups; ++group)
                    totals[m * p.groups + group] = sum_of(q + group * size, size);
            }
        };
        const auto parts = static_cast<size_t>((p.m + kTokensAPart - 1) / kTokensAPart);
        if (p.m * p.k < kFewActivations)
            for (size_t part = 0; part < parts; ++part) fill(part);
        else
            parallel.run(parts, fill);
        *sums = totals;
        return {rows ? rows : p.q, rows ? quads * quad : p.k, quad};
    }

    void run_tiles(const GemmProblem& p, const Panel& panel, const int32_t* sums, int64_t tile,
                   int64_t tiles) const {
        const int64_t dots_size = p.m * kTile;
        auto* dots = scratch<int32_t>(static_cast<size_t>(tiles * (dots_size + scales_size(p))), kDots);
        auto* values = reinterpret_cast<float*>(dots + tiles * dots_size);
        auto* weights = scratch<uint8_t>(static_cast<size_t>(tiles * kBytesABlock), kWeights);
        TileScales scales[kTilesATask];
        for (int64_t i = 0; i < tiles; ++i) scales[i] = scales_of(p, tile + i, values + i * scales_size(p));

        const int64_t quads = (p.k + 3) / 4, quads_a_group = p.groups > 1 ? quads / p.groups : quads;
        const int64_t most = kBytesABlock / (wide() ? 2 * kVector : kVector);
        for (int64_t group = 0; group < p.groups; ++group) {
            const int64_t begin = group * quads_a_group, end = begin + quads_a_group;
            for (int64_t first = begin; first < end; first += most) {
                const int64_t count = least(most, end - first);
                for (int64_t i = 0; i < tiles; ++i)
                    unpack_block(p, tile + i, first, count, weights + i * kBytesABlock);
                for (int64_t m = 0; m < p.m; m += Micro::kTokens) {
                    const int64_t tokens = least(Micro::kTokens, p.m - m);
                    const int8_t* q = panel.rows + m * panel.stride + first * panel.quad;
                    for (int64_t i = 0; i < tiles; ++i) {
                        int32_t* sum = dots + i * dots_size + m * kTile;
                        if (first == begin)
                            std::memset(sum, 0, static_cast<size_t>(tokens * kTile) * sizeof(int32_t));
                        micro_.add(q, panel.stride, weights + i * kBytesABlock, static_cast<int>(tokens),
                                   count, sum);
                        // Right after the sums: y is written while the next ones are computed.
                        if (first + count == end) finish(p, sums, scales[i], tile + i, group, m, tokens, sum);
                    }
                }
            }
        }
    }

    void unpack_block(const GemmProblem& p, int64_t tile, int64_t first, int64_t count, uint8_t* to) const {
        const auto* packed = reinterpret_cast<const uint8_t*>(p.w) + tile * tile_bytes(kFormat, p.k);
        if (wide())
            unpack_wide(packed, first, count, to);
        else
            unpack<Index>(packed, first, count, to);
    }

    // Adds a group to y; after the last one come s, bias and the branch.
    void finish(const GemmProblem& p, const int32_t* sums, const TileScales& scales, int64_t tile,
                int64_t group, int64_t first, int64_t tokens, const int32_t* dots) const {
        const int64_t outputs = least(kTile, p.n - tile * kTile);
        const auto bytes = static_cast<size_t>(outputs) * sizeof(float);
        for (int64_t m = first; m < first + tokens; ++m, dots += kTile) {
            float* const y = p.y + m * p.n + tile * kTile;
            const int32_t correction = sums ? kFormat.offset * sums[m * p.groups + group] : 0;
            if (outputs == kTile) {
                finish_row(p, scales, group, m, correction, dots, y);
            } else {
                float row[kTile] = {};
                if (group) std::memcpy(row, y, bytes);
                finish_row(p, scales, group, m, correction, dots, row);
                std::memcpy(y, row, bytes);
            }
        }
    }

    static void finish_row(const GemmProblem& p, const TileScales& scales, int64_t group, int64_t m,
                           int32_t correction, const int32_t* dots, float* to) {
        for (int half = 0; half < 2; ++half) {
            const Ints exact = load_half<Ints>(dots, half) - correction;
            Floats y =
                __builtin_convertvector(exact, Floats) * load_half<Floats>(scales.ws + group * kTile, half);
            if (group) y = load_half<Floats>(to, half) + y;
            if (group + 1 == p.groups) {
                y = y * p.s[m] + load_half<Floats>(scales.bias, half);
                for (int64_t r = 0; r < p.rank; ++r)
                    y += p.t[m * p.rank + r] * load_half<Floats>(scales.up + r * kTile, half);
            }
            store_half(to, half, y);
        }
    }

    Micro micro_;
    bool low_rank_;
    std::unique_ptr<CpuKernel> slow_;
};

template <class Micro>
std::unique_ptr<CpuKernel> make_tiled(const FormatSpec& format, const Attributes& attributes, bool low_rank) {
    if (format.planes == 3) return std::unique_ptr<CpuKernel>(new TiledGemm<1, Micro>(attributes, low_rank));
    if (format.radix == 3) return std::unique_ptr<CpuKernel>(new TiledGemm<0, Micro>(attributes, low_rank));
    if (format.radix == 16) return std::unique_ptr<CpuKernel>(new TiledGemm<2, Micro>(attributes, low_rank));
    return std::unique_ptr<CpuKernel>(new TiledGemm<3, Micro>(attributes, low_rank));
}

}  // namespace
}  // namespace d2d
