// How the CPU kernels walk a GEMM of ternary or 3-bit weights by table look-up (layout 1). The sums that a few
// weights can pick from a few activations of a token, 9 for two ternary ones and 81 for four, are built once as a
// table of bytes; then one shuffle instruction serves as many outputs as a vector has bytes, with the packed
// weights as index: no multiplication.
//
// A task is some tokens by some outputs. Block by block of K it builds its tokens' tables (second-level cache)
// and, for the outputs of one step of the micro-kernel at a time, brings the weights into index order
// (first-level cache), once for all its tokens: a few instructions for each index vector beside one look-up and
// one sum a token. In the file they stay at their packed width, in the order that the other kernels read.
//
// Exactness, with r = largest entry of a table = 2 * offset * codes in a table * max |q|, entries being shifted by r / 2
// so that none is negative:
//   bytes: `stretch` = 255 / r look-ups (r <= 255) are added up, then widened;
//   words: at most 65535 / r look-ups, a section, are added up, then spilled to int32;
//   a vector of bytes v, as words, is even + 256 odd: `all` sums v, `high` sums v >> 8, both modulo 2^16; high
//   is the sum of the odd bytes, which fits, and all - 256 high that of the even bytes modulo 2^16, which fits;
//   the shift is the same for every weight: r / 2 a look-up is taken off the sum of a group.
#pragma once

#include "activations.h"
#include "epilogue.h"
#include "layout.h"
#include "scratch.h"

namespace d2d {
namespace {

// Of the thread that runs a task; slots beside those of the tiles.
enum LookupSlot { kTables = 2, kWords = 3 };

typedef uint16_t PartWords __attribute__((vector_size(kPartBytes / 2)));

// Tables, what an instruction set brings:
//   kLanes       bytes of a vector: byte 2i is output i of kLanes, byte 2i + 1 output kLanes / 2 + i
//   kStepVectors, kStepTokens   vectors and tokens that the micro-kernel takes at once, kLeastVectors at a border
//   kGroupTokens tokens whose tables are there at once: all of a task, in the second-level cache, or as many as fit the
//                first, and then the index vectors of all its steps lie in the second
//   kFormat      of the weights
//   kCodes       activations in a table
//   kTableBytes
//   kBlockChunks chunks of a block of K: tables of a step's tokens and its index vectors fit the first level
//   kMostOutputs of a task: the more, the less do its tables cost; words and tables fit the second level
//   kMostLargest max |q| up to which look-ups win, as measured
//   build(q, chunks, shift, to)      tables of whole chunks of one token
//   order(tiles, vectors, chunks, to)  index vectors, [look-up][kStepVectors][kLanes], of chunks of the step's tiles
//   add(tables, stride, index, tokens, vectors, lookups, stretch, begins, sums)  adds to [token][vector][all, high][kLanes / 2],
//                                  or begins them
template <class Tables>
class LookupGemm : public CpuKernel {
  public:
    // `rest` computes what look-ups cannot, or not faster.
    LookupGemm(std::unique_ptr<CpuKernel> rest, GemmTerms terms) : rest_(std::move(rest)), terms_(terms) {}

    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const GemmProblem p(inputs, outputs, terms_);
        if (p.m == 0) return;
        const int largest = suits(p) ? largest_code(p, parallel) : kLargestCode;
        if (largest > Tables::kMostLargest) return rest_->run(inputs, outputs, parallel);
        const Split split = split_of(p);
        parallel.run(static_cast<size_t>(split.tasks(p)), [&](size_t index) {
            const int64_t blocks = split.blocks(p), task = static_cast<int64_t>(index);
            Task(p, split, largest, task % blocks * split.tokens, task / blocks * split.outputs).run();
        });
    }

  private:
    static constexpr FormatSpec kFormat = Tables::kFormat;
    static constexpr int64_t kChunkBytes = chunk_shape(kFormat).vectors * kVector;
    static constexpr int64_t kCodesAChunk = 4 * chunk_shape(kFormat).quads;
    static constexpr int64_t kStepOutputs = Tables::kLanes * Tables::kStepVectors;
    static constexpr int64_t kStepTiles = kStepOutputs / kTile;
    static constexpr int64_t kLookupsAChunk = kCodesAChunk / Tables::kCodes;
    static constexpr int64_t kBlockLookups = Tables::kBlockChunks * kLookupsAChunk;
    static constexpr int64_t kLeastOutputs = Tables::kLanes * Tables::kLeastVectors;
    static_assert(384 % kLeastOutputs == 0 && Tables::kMostOutputs % kStepOutputs == 0 &&
                      16 % Tables::kStepTokens == 0 && Tables::kGroupTokens % Tables::kStepTokens == 0 &&
                      (kBranchTokens % Tables::kStepTokens == 0 || Tables::kStepTokens % kBranchTokens == 0),
                  "tasks are whole steps");

    // By shape: a step that goes far beyond N computes more than it saves, and a group must end with a chunk.
    static bool suits(const GemmProblem& p) {
        const int64_t computed = (p.n + kLeastOutputs - 1) / kLeastOutputs * kLeastOutputs;
        return 3 * p.n >= 2 * computed && (p.groups == 1 || p.k / p.groups % kCodesAChunk == 0);
    }

    // A task's size: tables serve its outputs, ordered weights its tokens.
    struct Split {
        int64_t tokens, outputs;

        int64_t blocks(const GemmProblem& p) const { return (p.m + tokens - 1) / tokens; }
        int64_t tasks(const GemmProblem& p) const { return blocks(p) * ((p.n + outputs - 1) / outputs); }
    };

    // The largest that leaves two tasks a core. Beside the first, the others cost 8, 12 and 20 % of the time of
    // one thread at K 1152.
    static Split split_of(const GemmProblem& p) {
        for (const Split split : {Split{Tables::kMostTokens, Tables::kMostOutputs},
                                  Split{64, Tables::kMostOutputs}, Split{64, 384}, Split{32, 384}})
            if (split.tasks(p) >= 2 * cores()) return split;
        return {16, 384};
    }

    // Tokens from m and outputs from n, both cut at the border.
    struct Task {
        const GemmProblem& p;
        const int64_t m, tokens, tile, tiles, steps;
        const int64_t group_tokens, panels;  // steps whose index vectors are kept
        const int64_t range;                 // largest entry of a table
        const int64_t stretch;               // look-ups that fit a byte
        const int64_t section;               // look-ups that fit a word, in whole chunks
        uint8_t *const tables, *const index;
        uint16_t* sums;    // [group of tokens][step][token][kStepOutputs]
        int32_t* carries;  // [token][tile][16], of earlier sections of a group
        TileScales scales[Tables::kMostOutputs / kTile];

        Task(const GemmProblem& problem, const Split& split, int largest, int64_t token, int64_t output)
            : p(problem),
              m(token),
              tokens(least(split.tokens, p.m - m)),
              tile(output / kTile),
              tiles((least(split.outputs, p.n - output) + kTile - 1) / kTile),
              steps((tiles + kStepTiles - 1) / kStepTiles),
              group_tokens(least(Tables::kGroupTokens, tokens)),
              panels(group_tokens < tokens ? steps : 1),
              range(2 * kFormat.offset * Tables::kCodes * (largest ? largest : 1)),
              stretch(255 / range),
              section(65535 / range / kLookupsAChunk * kLookupsAChunk),
              tables(scratch<uint8_t>(static_cast<size_t>(group_tokens * kTableStride + panels * kIndexBytes),
                                      kTables)),
              index(tables + group_tokens * kTableStride) {
            const int64_t groups = (tokens + group_tokens - 1) / group_tokens;
            const int64_t words = groups * group_tokens * steps * kStepOutputs, dots = tiles * tokens * kTile;
            sums =
                scratch<uint16_t>(static_cast<size_t>(words + 2 * (dots + tiles * scales_size(p))), kWords);
            carries = reinterpret_cast<int32_t*>(sums + words);
            auto* values = reinterpret_cast<float*>(carries + dots);
            for (int64_t i = 0; i < tiles; ++i)
                scales[i] = scales_of(p, tile + i, values + i * scales_size(p));
        }

        static constexpr int64_t kTableStride = kBlockLookups * Tables::kTableBytes;
        static constexpr int64_t kIndexBytes = kBlockLookups * kStepOutputs;

        void run() {
            const int64_t chunks_a_group = chunks(kFormat, p.k / p.groups);
            for (int64_t group = 0; group < p.groups; ++group) {
                const int64_t begin = group * chunks_a_group, end = begin + chunks_a_group;
                for (int64_t first = begin; first < end; first += section / kLookupsAChunk) {
                    const int64_t last = least(end, first + section / kLookupsAChunk);
                    add_section(first, last, [&](int64_t step, int64_t t) {
                        finish(step, t, group, first > begin, last == end);
                    });
                }
            }
        }

        // Calls done(step, t) when the step's sums of tokens t .. are whole: right after they are, so that y is
        // written while the next ones are computed.
        template <class Done>
        void add_section(int64_t first, int64_t end, const Done& done) {
            for (int64_t chunk = first; chunk < end; chunk += Tables::kBlockChunks) {
                const int64_t count = least(Tables::kBlockChunks, end - chunk);
                for (int64_t group = 0; group < tokens; group += group_tokens) {
                    const int64_t beyond = least(tokens, group + group_tokens);
                    for (int64_t t = group; t < beyond; ++t)
                        build(m + t, chunk, count, tables + (t - group) * kTableStride);
                    fetch_codes(beyond < tokens ? beyond : 0, beyond < tokens ? chunk : chunk + count);
                    fetch_weights(tiles * group / tokens, tiles * beyond / tokens, chunk + count);
                    for (int64_t step = 0; step < steps; ++step) {
                        uint8_t* const panel = index + (panels > 1 ? step : 0) * kIndexBytes;
                        if (group == 0) order(step, chunk, count, panel);
                        for (int64_t t = group; t < beyond; t += Tables::kStepTokens) {
                            Tables::add(tables + (t - group) * kTableStride, kTableStride, panel,
                                        static_cast<int>(least(Tables::kStepTokens, beyond - t)),
                                        vectors(step), count * kLookupsAChunk, stretch, chunk == first,
                                        sums_of(step, t));
                            if (chunk + count == end) done(step, t);
                        }
                    }
                }
            }
        }

        uint16_t* sums_of(int64_t step, int64_t t) const {
            const int64_t group = t / group_tokens;
            return sums + ((group * steps + step) * group_tokens + t - group * group_tokens) * kStepOutputs;
        }

        // Of a step, those with tiles.
        int vectors(int64_t step) const {
            constexpr int64_t tiles_a_part = kLeastOutputs / kTile;
            const int64_t parts =
                (least(kStepTiles, tiles - step * kStepTiles) + tiles_a_part - 1) / tiles_a_part;
            return static_cast<int>(parts * Tables::kLeastVectors);
        }

        // Codes beyond K are zeros, whatever the weights there are.
        void build(int64_t token, int64_t chunk, int64_t count, uint8_t* to) const {
            const int8_t* q = p.q + token * p.k + chunk * kCodesAChunk;
            const int64_t whole = least(count, p.k / kCodesAChunk - chunk), shift = range / 2;
            Tables::build(q, whole, shift, to);
            if (whole == count) return;
            int8_t last[kCodesAChunk] = {};
            std::memcpy(last, q + whole * kCodesAChunk, static_cast<size_t>(p.k % kCodesAChunk));
            Tables::build(last, 1, shift, to + whole * kLookupsAChunk * Tables::kTableBytes);
        }

        // What is read next comes from the third-level cache, in pieces too short for the processor to see them coming.
        void fetch_codes(int64_t first, int64_t chunk) const {
            for (int64_t t = first; t < least(tokens, first + group_tokens); ++t)
                for (int64_t i = 0; i < Tables::kBlockChunks * kCodesAChunk; i += 64)
                    __builtin_prefetch(p.q + (m + t) * p.k + chunk * kCodesAChunk + i);
        }

        void fetch_weights(int64_t first, int64_t last, int64_t chunk) const {
            const auto* packed = reinterpret_cast<const uint8_t*>(p.w) + chunk * kChunkBytes;
            for (int64_t i = tile + first; i < tile + last; ++i)
                for (int64_t at = 0; at < Tables::kBlockChunks * kChunkBytes; at += kVector)
                    __builtin_prefetch(packed + i * tile_bytes(kFormat, p.k) + at, 0, 2);
        }

        // Outputs beyond N are those of the last tile once more; nobody reads their sums.
        void order(int64_t step, int64_t chunk, int64_t count, uint8_t* to) const {
            const auto* packed = reinterpret_cast<const uint8_t*>(p.w) + chunk * kChunkBytes;
            const int64_t size = tile_bytes(kFormat, p.k);
            const uint8_t* from[kStepTiles];
            for (int64_t i = 0; i < kStepTiles; ++i)
                from[i] = packed + (tile + least(step * kStepTiles + i, tiles - 1)) * size;
            Tables::order(from, vectors(step), count, to);
        }

        // Words to int32; after the last section of a group to y.
        void finish(int64_t step, int64_t first, int64_t group, bool carried, bool last) const {
            const auto shift =
                static_cast<int32_t>(range / 2 * kLookupsAChunk * chunks(kFormat, p.k / p.groups));
            const int64_t count = least(kStepTiles, tiles - step * kStepTiles);
            const int64_t end = least(tokens, first + Tables::kStepTokens);
            for (int64_t t = first; t < end; ++t) {
                const uint16_t* from = sums_of(step, t);
                int32_t* carry = carries + (t * tiles + step * kStepTiles) * kTile;
                const auto whole = [=](int64_t i, int part) {
                    const Ints here = words(from, i, part);
                    return carried ? here + load_part<Ints>(carry + i * kTile, part) : here;
                };
                if (last)
                    finish_tiles(p, scales + step * kStepTiles, tile + step * kStepTiles, count, group, m + t,
                                 [=](int64_t i, int part) { return whole(i, part) - shift; });
                else
                    for (int64_t i = 0; i < count; ++i)
                        for (int part = 0; part < kParts; ++part)
                            store_part(carry + i * kTile, part, whole(i, part));
            }
            if (!last || group + 1 < p.groups || (end % kBranchTokens && end < tokens)) return;
            const int64_t begin = (end - 1) / kBranchTokens * kBranchTokens;
            for (int64_t i = step * kStepTiles; i < step * kStepTiles + count; ++i)
                add_branch(p, scales[i], tile + i, m + begin, end - begin);
        }

        // A part of tile i of a step's sums of a token.
        static Ints words(const uint16_t* from, int64_t i, int part) {
            constexpr int64_t odd = Tables::kLanes / 2;
            const int64_t place = i * kTile + part * (kTile / kParts), lane = place % Tables::kLanes;
            from += place - lane + lane % odd;
            PartWords all, high;
            std::memcpy(&all, from, sizeof(all));
            std::memcpy(&high, from + odd, sizeof(high));
            return __builtin_convertvector(lane < odd ? all - (high << 8) : high, Ints);
        }
    };

    std::unique_ptr<CpuKernel> rest_;
    GemmTerms terms_;
};

}  // namespace
}  // namespace d2d
