// How the fast CPU kernels walk a GEMM in layout 1: tasks of tiles of outputs, blocks of tokens inside, a
// micro-kernel of an instruction set for the integer sums, and one epilogue.
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

constexpr int64_t kTilesATask = 8;  // 128 outputs: their weights and a block of tokens stay in the caches
constexpr int64_t kTokensABlock = 48;
constexpr int kMostTokens = 12;  // of a micro-kernel

// Rows of q as the micro-kernel reads them: K padded with zeros to whole chunks of each group.
struct Panel {
    const int8_t* rows;
    int64_t stride;
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline Panel panel_of(const GemmProblem& p, int64_t first, int64_t count, int64_t padded) {
    if (padded == p.k) return {p.q + first * p.k, p.k};
    auto* rows = scratch<int8_t>(static_cast<size_t>(count * padded), 0);
    for (int64_t i = 0; i < count; ++i) {
        std::memcpy(rows + i * padded, p.q + (first + i) * p.k, static_cast<size_t>(p.k));
        std::memset(rows + i * padded + p.k, 0, static_cast<size_t>(padded - p.k));
    }
    return {rows, padded};
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

// Sums of the activations of each token and group: codes are weights + offset, so offset * sum is taken off.
inline const int32_t* sums_of(const GemmProblem& p, int64_t first, int64_t count) {
    auto* sums = scratch<int32_t>(static_cast<size_t>(count * p.groups), 1);
    const int64_t size = p.k / p.groups;
    for (int64_t i = 0; i < count * p.groups; ++i) sums[i] = sum_of(p.q + first * p.k + i * size, size);
    return sums;
}

// What the epilogue needs of a tile, 16 outputs side by side and zeros beyond N: read once for a block of
// tokens.
struct TileScales {
    const float* ws;    // [groups][16]
    const float* bias;  // [16]
    const float* up;    // [rank][16]
};

inline TileScales scales_of(const GemmProblem& p, int64_t tile, int64_t outputs) {
    auto* values = scratch<float>(static_cast<size_t>((p.groups + 1 + p.rank) * kTile), 2);
    float* const bias = values + p.groups * kTile;
    float* const up = bias + kTile;
    std::memset(values, 0, static_cast<size_t>((p.groups + 1 + p.rank) * kTile) * sizeof(float));
    for (int64_t i = 0; i < outputs; ++i) {
        const int64_t n = tile * kTile + i;
        for (int64_t group = 0; group < p.groups; ++group)
            values[group * kTile + i] = p.ws[n * p.groups + group];
        bias[i] = p.bias[n];
        for (int64_t r = 0; r < p.rank; ++r) up[r * kTile + i] = p.up[n * p.rank + r];
    }
    return {values, bias, up};
}

// Micro: `offset(format)` is what its sums must be corrected by; `dot(tile, q, stride, tokens, chunks, sums)`
// writes the exact sums of 16 outputs for `tokens` tokens; `kTokens` is the most it takes at once.
template <int Index, class Micro>
class TiledGemm : public CpuKernel {
  public:
    TiledGemm(const Attributes& attributes, bool low_rank)
        : micro_(static_cast<int>(attributes.integer("bits"))),
          low_rank_(low_rank),
          slow_(make_quant_gemm_portable(kFormats[Index], attributes, low_rank)) {}

    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const GemmProblem p(inputs, outputs, low_rank_);
        if (p.m == 0) return;
        // A group that ends inside a chunk would need the chunk twice: no such size (it is no multiple of 32)
        // is worth it.
        if (p.groups > 1 && p.k / p.groups % (4 * kShape.quads)) return slow_->run(inputs, outputs, parallel);
        const int64_t tiles = (p.n + kTile - 1) / kTile;
        parallel.run(static_cast<size_t>((tiles + kTilesATask - 1) / kTilesATask), [&](size_t task) {
            const int64_t begin = static_cast<int64_t>(task) * kTilesATask,
                          end = least(tiles, begin + kTilesATask);
            for (int64_t m = 0; m < p.m; m += kTokensABlock)
                block(p, m, least(kTokensABlock, p.m - m), begin, end);
        });
    }

  private:
    static constexpr FormatSpec kFormat = kFormats[Index];
    static constexpr ChunkShape kShape = chunk_shape(kFormat);

    void block(const GemmProblem& p, int64_t first, int64_t count, int64_t begin, int64_t end) const {
        const Panel panel = panel_of(p, first, count, chunks(kFormat, p.k) * 4 * kShape.quads);
        const int32_t* sums = micro_.offset(kFormat) ? sums_of(p, first, count) : nullptr;
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t outputs = least(kTile, p.n - tile * kTile);
            const TileScales scales = scales_of(p, tile, outputs);
            for (int64_t token = 0; token < count;) {
                const int tokens = static_cast<int>(least(Micro::kTokens, count - token));
                micro_tile(p, panel, sums, scales, first, token, tokens, tile, outputs);
                token += tokens;
            }
        }
    }

    void micro_tile(const GemmProblem& p, const Panel& panel, const int32_t* sums, const TileScales& scales,
                    int64_t first, int64_t token, int tokens, int64_t tile, int64_t outputs) const {
        alignas(64) int32_t dots[kMostTokens][kTile];
        alignas(64) float y[kMostTokens][kTile];
        const int64_t chunks_a_group = chunks(kFormat, p.k) / p.groups;
        const auto* weights = reinterpret_cast<const uint8_t*>(p.w) + tile * tile_bytes(kFormat, p.k);
        const int32_t offset = micro_.offset(kFormat);
        for (int64_t group = 0; group < p.groups; ++group) {
            micro_.template dot<Index>(
                weights + group * chunks_a_group * kShape.vectors * kVector,
                panel.rows + token * panel.stride + group * chunks_a_group * 4 * kShape.quads, panel.stride,
                tokens, chunks_a_group, dots);
            const float* ws = scales.ws + group * kTile;
            for (int t = 0; t < tokens; ++t) {
                const int32_t correction = offset ? offset * sums[(token + t) * p.groups + group] : 0;
                for (int i = 0; i < kTile; ++i) {
                    const float part = static_cast<float>(dots[t][i] - correction) * ws[i];
                    y[t][i] = group ? y[t][i] + part : part;
                }
            }
        }
        for (int t = 0; t < tokens; ++t) {
            const int64_t row = first + token + t;
            const float s = p.s[row];
            for (int i = 0; i < kTile; ++i) y[t][i] = y[t][i] * s + scales.bias[i];
            for (int64_t r = 0; r < p.rank; ++r) {
                const float factor = p.t[row * p.rank + r];
                for (int i = 0; i < kTile; ++i) y[t][i] += factor * scales.up[r * kTile + i];
            }
            float* to = p.y + row * p.n + tile * kTile;
            if (outputs == kTile)
                std::memcpy(to, y[t], sizeof(y[t]));  // a size that is known becomes plain stores
            else
                std::memcpy(to, y[t], static_cast<size_t>(outputs) * sizeof(float));
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
