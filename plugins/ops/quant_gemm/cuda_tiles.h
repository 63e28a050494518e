// <Format>Gemm for many tokens: block tiles, activations and packed weights through shared memory.
//
// A block computes 16 RowTiles WarpRows tokens times 32 WarpColumns outputs, a warp 16 RowTiles times 32. Steps are 64
// deep (a unit of weights); copy_async brings steps ahead into a ring of stages. One barrier a step does both: it
// publishes the step that has arrived, and frees the stage that the next copies overwrite. Activations lie in rows of
// four 16-byte pieces, piece p of row r at p XOR (r / 2 % 4), packed ones in rows of two, at p XOR (r / 4 % 2): neither the
// copies nor ldmatrix meet a bank twice.
//
// Where that makes few blocks and K is long, K is split (cuda_plan.cc): sums lie in memory as int32 meanwhile, in y itself or
// in a workspace. One launch sets them to 0, one has a block for each tile and slice of K, which adds its sums, one makes y
// of them. Integers add up to the same in every order, and the last launch computes what a whole block would: the same bits.
#pragma once

#include "cuda_parts.h"

namespace {

template <int Index, int RowTiles, int WarpRows, int WarpColumns, bool Packed = false>
struct Tiling {
    static constexpr int row_pieces = Packed ? 2 : 4;  // of a step's activations, 16 bytes each
    static constexpr int threads = kWarp * WarpRows * WarpColumns;
    static constexpr int rows = 16 * RowTiles * WarpRows;
    static constexpr int columns = d2d::kUnitOutputs * WarpColumns;
    static constexpr int activations = row_pieces * rows;
    static constexpr int weights = WarpColumns * Weights<Index>::pieces;
    static constexpr int stage = activations + weights;
    static constexpr int stages = 4 * stage * 16 <= 48 << 10 ? 4 : 3;  // what every GPU gives without asking

    static GPU_DEVICE int swizzled(int row, int piece) {
        return row_pieces * row + (piece ^ (row * row_pieces / 8 % row_pieces));
    }
};

// What a thread copies of every step.
template <int Index, class T>
struct Copies {
    using W = Weights<Index>;
    // Piece me % row_pieces of the rows me / row_pieces + i * rows, which all have the same swizzle; and packed weights.
    static constexpr int mine = T::activations / T::threads,
                         most = (T::weights + T::threads - 1) / T::threads, rows = T::threads / T::row_pieces,
                         row_step = 16 * T::row_pieces;
    static_assert(rows % 8 == 0 && T::activations % T::threads == 0, "rows of one swizzle");

    int me, piece, to, row_bytes;
    const int8_t* from[mine];
    bool there[mine];
    const gpu::Vec16* packed[most];
    bool stored[most];

    GPU_DEVICE Copies(const Ports& p, int thread, int first_row, int first_strip, int step, int all_steps)
        : me(thread),
          piece(thread % T::row_pieces),
          to(T::swizzled(thread / T::row_pieces, piece)),
          row_bytes((int)p.k * T::row_pieces / 4) {
#pragma unroll
        for (int i = 0; i < mine; ++i) {
            const int row = first_row + me / T::row_pieces + i * rows;
            there[i] = row < p.m;
            from[i] = p.q + (int64_t)(there[i] ? row : 0) * row_bytes + row_step * step + 16 * piece;
        }
#pragma unroll
        for (int i = 0; i < most; ++i) {
            const int at = me + i * T::threads;
            const int strip = first_strip + at / W::pieces;
            stored[i] = strip < d2d::strips(p.n);
            packed[i] = reinterpret_cast<const gpu::Vec16*>(p.w) +
                        ((int64_t)(stored[i] ? strip : 0) * all_steps + step) * W::pieces + at % W::pieces;
        }
    }

    // Begins the next step, `step`, into a stage, where it is below `steps`; a group either way.
    GPU_DEVICE void fetch(const gpu::Shared<gpu::Vec16>& memory, int stage, int step, int steps) {
        if (step < steps) {
            const bool inside = row_step * step + 16 * piece < row_bytes;
#pragma unroll
            for (int i = 0; i < mine; ++i) {
                gpu::copy_async(memory, stage + to + i * T::threads, from[i], inside && there[i]);
                from[i] += row_step;
            }
#pragma unroll
            for (int i = 0; i < most; ++i) {
                const int at = me + i * T::threads;
                if (at < T::weights)
                    gpu::copy_async(memory, stage + T::activations + at, packed[i], stored[i]);
                packed[i] += W::pieces;
            }
        }
        gpu::copy_async_commit();
    }
};

template <int RowTiles>
struct Values {
    float at[RowTiles][4][4];  // [16 tokens][8 outputs][register of mma's D]
};

template <int RowTiles>
struct Sums {
    int at[RowTiles][4][4];
};

// How much larger the sums of codes and of weights at the top of a byte are: nibbles are at the top of a nibble, and
// codes at the top of a byte are 16 times what they were.
template <Codes codes>
constexpr float kStep = codes == Codes::bytes     ? 1.0f
                        : codes == Codes::nibbles ? 16.0f
                                                  : 1.0f / 16;

// The sums of one group, scaled, are added to `total`; they begin again at 0.
template <int Index, Codes codes, int RowTiles>
GPU_DEVICE void finish_group(const Ports& p, int column, int group, Sums<RowTiles>& sums,
                             Values<RowTiles>& total) {
#pragma unroll
    for (int tile = 0; tile < 4; ++tile)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int output = column + 8 * tile + odd;
            constexpr float scale = kStep<codes> * Weights<Index>::scale;
            const float ws = output < p.n ? scale * gpu::load(p.ws + output * p.groups + group) : 0.0f;
#pragma unroll
            for (int i = 0; i < RowTiles; ++i)
#pragma unroll
                for (int r = odd; r < 4; r += 2) {
                    total.at[i][tile][r] += (float)sums.at[i][tile][r] * ws;
                    sums.at[i][tile][r] = 0;
                }
        }
}

// value += t up^T, four ranks at a time through shared memory: one 16-byte element a token, then one an output. Read
// from global memory instead, every lane would keep 16 pointers.
template <class T, int RowTiles>
GPU_DEVICE void add_branch(const Ports& p, const gpu::Shared<gpu::Vec16>& memory, int first_row,
                           int first_column, int row, int column, Values<RowTiles>& value) {
#pragma unroll 1
    for (int64_t rank = 0; rank < p.rank; rank += 4) {
        gpu::sync_block();
#pragma unroll 1
        for (int i = (int)gpu::thread(); i < T::rows + T::columns; i += T::threads) {
            const bool token = i < T::rows;
            const int line = token ? first_row + i : first_column + i - T::rows;
            const bool inside = line < (token ? p.m : p.n);
            const auto* from = reinterpret_cast<const uint32_t*>(token ? p.t : p.up) + line * p.rank + rank;
            uint32_t ranks[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) ranks[r] = inside && rank + r < p.rank ? gpu::load(from + r) : 0;
            memory.store(i, {ranks[0], ranks[1], ranks[2], ranks[3]});
        }
        gpu::sync_block();
#pragma unroll 1
        for (int r = 0; r < 4; ++r) {
            float up[4][2];
#pragma unroll
            for (int tile = 0; tile < 4; ++tile)
#pragma unroll
                for (int odd = 0; odd < 2; ++odd)
                    up[tile][odd] =
                        memory.template load_part<float>(4 * (T::rows + column + 8 * tile + odd) + r);
#pragma unroll
            for (int i = 0; i < RowTiles; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float t = memory.template load_part<float>(4 * (row + 16 * i + 8 * half) + r);
#pragma unroll
                    for (int tile = 0; tile < 4; ++tile)
#pragma unroll
                        for (int odd = 0; odd < 2; ++odd) {
                            float& v = value.at[i][tile][2 * half + odd];
                            v = gpu::multiply_add(t, up[tile][odd], v);
                        }
                }
        }
    }
}

// Scale of the token and bias. `row` and `column` are those of the lane's first value.
template <int RowTiles>
GPU_DEVICE void scale_tokens(const Ports& p, int row, int column, Values<RowTiles>& value) {
#pragma unroll
    for (int i = 0; i < RowTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = row + 16 * i + 8 * half;
            const float s = token < p.m ? gpu::load(p.s + token) : 0.0f;
#pragma unroll
            for (int tile = 0; tile < 4; ++tile)
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    const int output = column + 8 * tile + odd;
                    const float bias = output < p.n ? gpu::load(p.bias + output) : 0.0f;
                    float& v = value.at[i][tile][2 * half + odd];
                    v = v * s + bias;
                }
        }
}

// value = residual + gate value
template <int RowTiles>
GPU_DEVICE void join(const Ports& p, int row, int column, Values<RowTiles>& value) {
    if (!p.residual) return;
    const bool pairs = p.dtype != kFloat32 || p.n % 2 == 0;  // as in `write`
#pragma unroll
    for (int i = 0; i < RowTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = row + 16 * i + 8 * half;
            if (token >= p.m) continue;
            const Stream stream = stream_of(p, token);
#pragma unroll
            for (int tile = 0; tile < 4; ++tile) {
                const int output = column + 8 * tile;
                if (output >= p.n) continue;
                float &first = value.at[i][tile][2 * half], &second = value.at[i][tile][2 * half + 1];
                if (pairs) {
                    const gpu::Float2 both = stream.joined(output, {first, second});
                    first = both.x;
                    second = both.y;
                } else {
                    first = stream.joined(output, first);
                    if (output + 1 < p.n) second = stream.joined(output + 1, second);
                }
            }
        }
}

template <int RowTiles>
GPU_DEVICE void write(const Ports& p, int row, int column, const Values<RowTiles>& value) {
    // Then both outputs of a lane lie in one aligned store; of halves N is even. (Four lanes store 16 bytes of halves, half
    // a sector: the second-level cache joins it with that of the next tile.)
    const bool pairs = p.dtype != kFloat32 || p.n % 2 == 0;
#pragma unroll
    for (int i = 0; i < RowTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int tile = 0; tile < 4; ++tile) {
                const int token = row + 16 * i + 8 * half, output = column + 8 * tile;
                if (token >= p.m || output >= p.n) continue;
                const int64_t at = (int64_t)token * p.n + output;
                const float first = value.at[i][tile][2 * half], second = value.at[i][tile][2 * half + 1];
                if (pairs) {
                    store_pair(p.y, at, p.dtype, {first, second});
                } else {
                    store_element(p.y, at, p.dtype, first);
                    if (output + 1 < p.n) store_element(p.y, at + 1, p.dtype, second);
                }
            }
}

// y of the values before gate and residual.
template <int RowTiles>
GPU_DEVICE void put(const Ports& p, int row, int column, Values<RowTiles>& value) {
    join(p, row, column, value);
    write(p, row, column, value);
}

// y of values without the token's scale, in lane order: `row` and `column` are those of the lane's first within the block.
template <class T, int RowTiles>
GPU_DEVICE void finish_tile(const Ports& p, const gpu::Shared<gpu::Vec16>& memory, int first_row,
                            int first_column, int row, int column, Values<RowTiles>& value) {
    scale_tokens(p, first_row + row, first_column + column, value);
    add_branch<T>(p, memory, first_row, first_column, row, column, value);
    if (p.dtype == kFloat32)
        put(with_dtype(p, kFloat32), first_row + row, first_column + column, value);
    else
        put(p, first_row + row, first_column + column, value);
}

// Adds the sums to those of int8 products at y, which is where a plan has them lie.
template <Codes codes, int RowTiles>
GPU_DEVICE void add_sums(const Ports& p, int row, int column, const Sums<RowTiles>& sums) {
#pragma unroll
    for (int i = 0; i < RowTiles; ++i)
#pragma unroll
        for (int tile = 0; tile < 4; ++tile)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int token = row + 16 * i + 8 * (r / 2), output = column + 8 * tile + r % 2;
                if (token >= p.m || output >= p.n) continue;
                int sum = sums.at[i][tile][r];
                if constexpr (codes == Codes::nibbles) sum *= 16;
                if constexpr (codes == Codes::nibbles_as_bytes) sum /= 16;  // exact
                gpu::add(static_cast<int*>(p.y) + (int64_t)token * p.n + output, sum);
            }
}

// A of 16 tokens for part `part` of a step: k's 32 part .. + 31, of nibbles all 64.
template <Codes codes>
GPU_DEVICE void load_activations(const gpu::Shared<gpu::Vec16>& memory, int row, int tile, int part,
                                 uint32_t (&a)[4]) {
    if constexpr (codes == Codes::bytes) {
        gpu::ldmatrix_x4(a, memory, (row ^ 2 * part) + tile);
    } else {
        gpu::ldmatrix_x4(a, memory, row + tile);
        if constexpr (codes == Codes::nibbles_as_bytes)
#pragma unroll
            for (int r = 0; r < 4; ++r) a[r] = codes_as_bytes(a[r], part);
    }
}

enum class Of { whole, groups, slice };

// K is a multiple of 16, its groups of 32 (packed: both of 64); q and w are 16-byte aligned. Of::slice: sums of the block's
// part of K alone. Packed codes are for weights of at most 4 bits.
template <int Index, int RowTiles, int WarpRows, int WarpColumns, Of of, Codes codes = Codes::bytes>
GPU_DEVICE void tile_gemm(const Ports& p) {
    using T = Tiling<Index, RowTiles, WarpRows, WarpColumns, codes != Codes::bytes>;
    using W = Weights<Index>;
    GPU_SHARED(gpu::Vec16, memory, T::stages * T::stage);
    const int me = (int)gpu::thread(), lane = me % kWarp, warp = me / kWarp;
    const int warp_row = warp / WarpColumns * 16 * RowTiles, warp_column = warp % WarpColumns;
    const int first_row = (int)gpu::block_x() * T::rows, first_strip = (int)gpu::block_y() * WarpColumns;
    const int all_steps = (int)d2d::strip_units(p.k);
    int step = 0, steps = all_steps;  // from, up to
    if constexpr (of == Of::slice) {
        step = (int)(all_steps * gpu::block_z() / gpu::blocks_z());
        steps = (int)(all_steps * (gpu::block_z() + 1) / gpu::blocks_z());
    }

    Copies<Index, T> copies(p, me, first_row, first_strip, step, all_steps);

    Sums<RowTiles> sums = {};
    Values<RowTiles> value = {};
    const int lane_row = warp_row + lane / 4, lane_column = warp_column * d2d::kUnitOutputs + 2 * (lane % 4);
    const int first_column = first_strip * d2d::kUnitOutputs, column = first_column + lane_column;
    constexpr int parts = codes == Codes::nibbles ? 1 : 2;  // of a step
    const int group_parts = (int)(p.k / p.groups) / (d2d::kUnitDepth / parts);
    int done = 0, group = 0;
    int stage = 0, stage_before = (T::stages - 1) * T::stage;
    const int a_row = T::swizzled(warp_row + lane % 16, lane / 16);  // the second half of bytes: XOR 2
#pragma unroll
    for (int i = 0; i < T::stages - 1; ++i) copies.fetch(memory, i * T::stage, step + i, steps);
#pragma unroll 1
    for (; step < steps; ++step) {
        gpu::copy_async_wait<T::stages - 2>();
        gpu::sync_block();
        copies.fetch(memory, stage_before, step + T::stages - 1, steps);
        W weights;
        weights.from_shared(memory, stage + T::activations + warp_column * W::pieces, lane);
#pragma unroll
        for (int part = 0; part < parts; ++part) {
            uint32_t a[RowTiles][4];
#pragma unroll
            for (int i = 0; i < RowTiles; ++i)
                load_activations<codes>(memory, a_row, stage + 16 * T::row_pieces * i, part, a[i]);
#pragma unroll
            for (int tile = 0; tile < 4; ++tile) {
                if constexpr (codes == Codes::nibbles) {
                    const uint32_t b0 = weights.nibbles(tile, 0), b1 = weights.nibbles(tile, 1);
#pragma unroll
                    for (int i = 0; i < RowTiles; ++i) gpu::mma_16_8_64(sums.at[i][tile], a[i], b0, b1);
                } else {
                    const uint32_t b0 = weights.fragment(tile, 2 * part),
                                   b1 = weights.fragment(tile, 2 * part + 1);
#pragma unroll
                    for (int i = 0; i < RowTiles; ++i) gpu::mma_16_8_32(sums.at[i][tile], a[i], b0, b1);
                }
            }
            if constexpr (of == Of::groups) {
                if (++done == group_parts && group < p.groups) {  // beyond K there are units, but no groups
                    finish_group<Index, codes>(p, column, group++, sums, value);
                    done = 0;
                }
            }
        }
        stage_before = stage;
        stage = stage == (T::stages - 1) * T::stage ? 0 : stage + T::stage;
    }
    const int row = first_row + lane_row;
    if constexpr (of == Of::slice) {
        add_sums<codes>(p, row, column, sums);
        return;
    }
    if constexpr (of == Of::whole) finish_group<Index, codes>(p, column, 0, sums, value);
    finish_tile<T>(p, memory, first_row, first_column, lane_row, lane_column, value);
}

// Of packed codes.
template <int Index, int RowTiles, int WarpRows, int WarpColumns, Of of>
GPU_DEVICE void packed_gemm(const Ports& p) {
    if (gpu::has_int4_tensor_cores())
        tile_gemm<Index, RowTiles, WarpRows, WarpColumns, of, Codes::nibbles>(p);
    else
        tile_gemm<Index, RowTiles, WarpRows, WarpColumns, of, Codes::nibbles_as_bytes>(p);
}

}  // namespace
