// How the fast CPU kernels walk a GEMM in layout 1: a task is a few tiles of 16 outputs by all tokens, or by a part
// of them where that leaves cores idle; its weights are unpacked once for its tokens, a block of K at a time so that a
// tile's stay in the first-level cache; a micro-kernel of an instruction set adds up the integers of a few tokens; one
// epilogue.
//
// In an anonymous namespace, for the reason that epilogue.h gives.
#pragma once

#include "activations.h"
#include "epilogue.h"
#include "layout.h"
#include "scratch.h"

namespace d2d {
namespace {

constexpr int64_t kTilesATask = 4;  // read the activations once for 64 outputs
// At least, where tokens are split: unpacking is then 3 % of a task's instructions (AVX2).
constexpr int64_t kTokensATask = 64;
// Of unpacked weights that a micro-kernel reads at once: the rest of 32 KiB is for activations.
constexpr int64_t kBytesABlock = 20480;

// Of the thread that runs a node: kPanel, kSums, which all its tasks read; of the thread that runs a task:
// the others.
enum Slot { kPanel, kSums, kWeights, kDots };

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
        for (int part = 0; part < kParts; ++part) {
            Bits codes = load_part<Bits>(low, part) >> shift & mask;
            if constexpr (planes) codes |= (load_part<Bits>(chunk + 2 * kVector, part) >> place & ones) << 2;
            store_part(to, part, codes);
        }
    }
}

// int8 weights as int16, 128 bytes a quad: k's 0 and 2 of the 16 outputs, then k's 1 and 3. In this order two
// shifts widen them.
inline void unpack_wide(const uint8_t* tile, int64_t first, int64_t count, uint8_t* to) {
    const uint8_t* from = tile + first * kVector;
    for (int64_t quad = 0; quad < count; ++quad, from += kVector, to += 2 * kVector)
        for (int part = 0; part < kParts; ++part) {
            const Words pairs =
                load_part<Words>(from, part) ^ static_cast<int16_t>(0x8080);  // code - 128, twice
            store_part(to, part, pairs << 8 >> 8);
            store_part(to + kVector, part, pairs >> 8);
        }
}

// Micro(format, largest): made for the codes of one call, |q| <= largest, which is looked for where
// kAsksForLargest; kTokens is the most tokens it takes at once, of kTiles tiles; wide() tells whether it reads int16 (int8
// weights only), centred() whether it takes weights for codes, offset subtracted; add(q, stride, weights, tokens, quads, dots) adds the exact sums of 16 outputs to
// dots[tokens][16]; with kTiles above 1 add_tiles(q, stride, weights, tile_bytes, tokens, quads, dots, tile_dots) those of kTiles
// tiles, which are so far apart.
template <int Index, class Micro>
class TiledGemm : public CpuKernel {
  public:
    TiledGemm(const Attributes& attributes, GemmTerms terms)
        : terms_(terms), slow_(make_quant_gemm_portable(kFormat, attributes, terms)) {}

    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const GemmProblem p(inputs, outputs, terms_);
        if (p.m == 0) return;
        // A group that ends inside a quad would need the quad twice: no such size is worth it.
        if (p.groups > 1 && p.k / p.groups % 4) return slow_->run(inputs, outputs, parallel);
        const Micro micro(kFormat, Micro::kAsksForLargest ? largest_code(p, parallel) : kLargestCode);
        const int32_t* sums = nullptr;
        const Panel panel = prepare(p, is_wide(micro), micro.centred(), &sums, parallel);
        const int64_t tiles = (p.n + kTile - 1) / kTile, columns = (tiles + kTilesATask - 1) / kTilesATask;
        const int64_t tokens = tokens_a_task(p.m, columns), blocks = (p.m + tokens - 1) / tokens;
        parallel.run(static_cast<size_t>(columns * blocks), [&](size_t task) {
            const int64_t tile = static_cast<int64_t>(task) / blocks * kTilesATask;
            const int64_t first = static_cast<int64_t>(task) % blocks * tokens;
            run_tiles(p, micro, panel, sums, tile, least(kTilesATask, tiles - tile), first,
                      least(p.m, first + tokens));
        });
    }

  private:
    static constexpr FormatSpec kFormat = kFormats[Index];
    static constexpr bool kMayBeWide = Index == 3;
    static constexpr int64_t kTileBytes = kBytesABlock / Micro::kTiles / kVector * kVector;

    static bool is_wide(const Micro& micro) { return kMayBeWide && micro.wide(); }

    // All, or as many as leave four tasks a core: with fewer, the last ones run while most cores have nothing to do.
    static int64_t tokens_a_task(int64_t m, int64_t columns) {
        int64_t blocks = 1;
        while (columns * blocks < 4 * cores() && m >= 2 * blocks * kTokensATask) blocks *= 2;
        return ((m + blocks - 1) / blocks + Micro::kTokens - 1) / Micro::kTokens * Micro::kTokens;
    }

    // Pads and widens the activations where that is needed, and adds them up by token and group: codes are
    // weights + offset, so offset * sum is taken off. Both stay in the scratch of this thread until all tasks
    // are done.
    static Panel prepare(const GemmProblem& p, bool wide, bool centred, const int32_t** sums,
                         const Parallel& parallel) {
        const int64_t quads = (p.k + 3) / 4, quad = wide ? 8 : 4, size = p.k / p.groups;
        int8_t* rows = nullptr;
        int32_t* totals = nullptr;
        if (wide || p.k % 4) rows = scratch<int8_t>(static_cast<size_t>(p.m * quads * quad), kPanel);
        if (!centred) totals = scratch<int32_t>(static_cast<size_t>(p.m * p.groups), kSums);
        for_tokens(p, parallel, [&](int64_t m) {
            const int8_t* q = p.q + m * p.k;
            if (rows) fill_row(q, p.k, quads, wide, rows + m * quads * quad);
            for (int64_t group = 0; totals && group < p.groups; ++group)
                totals[m * p.groups + group] = sum_of(q + group * size, size);
        });
        *sums = totals;
        return {rows ? rows : p.q, rows ? quads * quad : p.k, quad};
    }

    static void run_tiles(const GemmProblem& p, const Micro& micro, const Panel& panel, const int32_t* sums,
                          int64_t tile, int64_t tiles, int64_t begin_token, int64_t end_token) {
        const bool wide = is_wide(micro);
        const int64_t dots_size = (end_token - begin_token) * kTile;
        auto* dots = scratch<int32_t>(static_cast<size_t>(tiles * (dots_size + scales_size(p))), kDots);
        auto* values = reinterpret_cast<float*>(dots + tiles * dots_size);
        auto* weights = scratch<uint8_t>(static_cast<size_t>(tiles * kTileBytes), kWeights);
        TileScales scales[kTilesATask];
        for (int64_t i = 0; i < tiles; ++i) scales[i] = scales_of(p, tile + i, values + i * scales_size(p));

        const int64_t quads = (p.k + 3) / 4, quads_a_group = p.groups > 1 ? quads / p.groups : quads;
        const int64_t most = kTileBytes / (wide ? 2 * kVector : kVector);
        for (int64_t group = 0; group < p.groups; ++group) {
            const int64_t begin = group * quads_a_group, end = begin + quads_a_group;
            for (int64_t first = begin; first < end; first += most) {
                const int64_t count = least(most, end - first);
                for (int64_t i = 0; i < tiles; ++i)
                    unpack_block(p, wide, tile + i, first, count, weights + i * kTileBytes);
                for (int64_t m = begin_token; m < end_token; m += Micro::kTokens) {
                    const int64_t tokens = least(Micro::kTokens, end_token - m);
                    const int8_t* q = panel.rows + m * panel.stride + first * panel.quad;
                    for (int64_t i = 0; i < tiles;) {
                        const int64_t at_once = tiles - i < Micro::kTiles ? 1 : Micro::kTiles;
                        int32_t* sum = dots + i * dots_size + (m - begin_token) * kTile;
                        for (int64_t j = 0; first == begin && j < at_once; ++j)
                            std::memset(sum + j * dots_size, 0,
                                        static_cast<size_t>(tokens * kTile) * sizeof(int32_t));
                        const uint8_t* from = weights + i * kTileBytes;
                        if constexpr (Micro::kTiles > 1)
                            if (at_once > 1)
                                micro.add_tiles(q, panel.stride, from, kTileBytes, static_cast<int>(tokens),
                                                count, sum, dots_size);
                        if (at_once == 1)
                            micro.add(q, panel.stride, from, static_cast<int>(tokens), count, sum);
                        // Right after the sums: y is written while the next ones are computed.
                        if (first + count == end)
                            finish(p, sums, scales + i, tile + i, at_once, group, m, tokens, sum, dots_size);
                        i += at_once;
                    }
                }
            }
        }
    }

    static void unpack_block(const GemmProblem& p, bool wide, int64_t tile, int64_t first, int64_t count,
                             uint8_t* to) {
        const auto* packed = reinterpret_cast<const uint8_t*>(p.w) + tile * tile_bytes(kFormat, p.k);
        if (wide)
            unpack_wide(packed, first, count, to);
        else
            unpack<Index>(packed, first, count, to);
    }

    static void finish(const GemmProblem& p, const int32_t* sums, const TileScales* scales, int64_t tile,
                       int64_t tiles, int64_t group, int64_t first, int64_t tokens, const int32_t* dots,
                       int64_t tile_dots) {
        for (int64_t m = first; m < first + tokens; ++m, dots += kTile) {
            const int32_t shift = sums ? kFormat.offset * sums[m * p.groups + group] : 0;
            finish_tiles(p, scales, tile, tiles, group, m, [=](int64_t i, int part) {
                return load_part<Ints>(dots + i * tile_dots, part) - shift;
            });
        }
        if (group + 1 < p.groups) return;
        for (int64_t i = 0; i < tiles; ++i) add_branch(p, scales[i], tile + i, first, tokens);
    }

    GemmTerms terms_;
    std::unique_ptr<CpuKernel> slow_;
};

template <class Micro>
std::unique_ptr<CpuKernel> make_tiled(const FormatSpec& format, const Attributes& attributes,
                                      GemmTerms terms) {
    if (format.planes == 3) return std::unique_ptr<CpuKernel>(new TiledGemm<1, Micro>(attributes, terms));
    if (format.radix == 3) return std::unique_ptr<CpuKernel>(new TiledGemm<0, Micro>(attributes, terms));
    if (format.radix == 16) return std::unique_ptr<CpuKernel>(new TiledGemm<2, Micro>(attributes, terms));
    return std::unique_ptr<CpuKernel>(new TiledGemm<3, Micro>(attributes, terms));
}

}  // namespace
}  // namespace d2d
