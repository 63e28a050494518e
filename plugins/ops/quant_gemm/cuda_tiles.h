// <Format>Gemm for many tokens: block tiles, activations and packed weights through shared memory.
//
// A block computes 16 RowTiles WarpRows tokens times 32 WarpColumns outputs, a warp 16 RowTiles times 32. Steps are 64
// deep (a unit of weights); copy_async brings steps ahead into a ring of stages. One barrier a step does both: it
// publishes the step that has arrived, and frees the stage that the next copies overwrite. Activations lie in rows of
// four 16-byte pieces, piece p of row r at p XOR (r / 2 % 4): neither the copies nor ldmatrix meet a bank twice.
//
// Where that makes few blocks and K is long, K is split (cuda_plan.cc): sums lie in memory as int32 meanwhile, in y itself or
// in a workspace. One launch sets them to 0, one has a block for each tile and slice of K, which adds its sums, one makes y
// of them. Integers add up to the same in every order, and the last launch computes what a whole block would: the same bits.
#pragma once

#include "cuda_parts.h"

namespace {

GPU_DEVICE int swizzled(int row, int piece) { return 4 * row + (piece ^ (row / 2 % 4)); }

template <int Index, int RowTiles, int WarpRows, int WarpColumns>
struct Tiling {
    static constexpr int threads = kWarp * WarpRows * WarpColumns;
    static constexpr int rows = 16 * RowTiles * WarpRows;
    static constexpr int columns = d2d::kUnitOutputs * WarpColumns;
    static constexpr int activations = 4 * rows;  // pieces of 16 bytes
    static constexpr int weights = WarpColumns * Weights<Index>::pieces;
    static constexpr int stage = activations + weights;
    static constexpr int stages = 4 * stage * 16 <= 48 << 10 ? 4 : 3;  // what every GPU gives without asking
};

// What a thread copies of every step.
template <int Index, class T>
struct Copies {
    using W = Weights<Index>;
    // Piece me % 4 of rows me / 4 + i * threads / 4, which all have the same swizzle; and packed weights.
    static constexpr int mine = T::activations / T::threads,
                         most = (T::weights + T::threads - 1) / T::threads;
    static_assert(T::threads / 4 % 8 == 0 && T::activations % T::threads == 0, "rows of one swizzle");

    int me, piece, to, depth;
    const int8_t* from[mine];
    bool there[mine];
    const gpu::Vec16* packed[most];
    bool stored[most];

    GPU_DEVICE Copies(const Ports& p, int thread, int first_row, int first_strip, int step, int all_steps)
        : me(thread), piece(thread % 4), to(swizzled(thread / 4, piece)), depth((int)p.k) {
#pragma unroll
        for (int i = 0; i < mine; ++i) {
            const int row = first_row + me / 4 + i * (T::threads / 4);
            there[i] = row < p.m;
            from[i] = p.q + (int64_t)(there[i] ? row : 0) * p.k + 64 * step + 16 * piece;
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
            const bool inside = 64 * step + 16 * piece < depth;
#pragma unroll
            for (int i = 0; i < mine; ++i) {
                gpu::copy_async(memory, stage + to + i * T::threads, from[i], inside && there[i]);
                from[i] += 64;
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

// How much larger the sums of int8 products are than those of `Bits`-wide ones: what stands at the top of a nibble stood at
// the top of a byte.
template <int Bits>
constexpr int kStep = 1 << (8 - Bits);

// The sums of one group, scaled, are added to `total`; they begin again at 0.
template <int Index, int Bits, int RowTiles>
GPU_DEVICE void finish_group(const Ports& p, int column, int group, Sums<RowTiles>& sums,
                             Values<RowTiles>& total) {
#pragma unroll
    for (int tile = 0; tile < 4; ++tile)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int output = column + 8 * tile + odd;
            constexpr float scale = kStep<Bits> * Weights<Index>::scale;
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
template <int Bits, int RowTiles>
GPU_DEVICE void add_sums(const Ports& p, int row, int column, const Sums<RowTiles>& sums) {
#pragma unroll
    for (int i = 0; i < RowTiles; ++i)
#pragma unroll
        for (int tile = 0; tile < 4; ++tile)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int token = row + 16 * i + 8 * (r / 2), output = column + 8 * tile + r % 2;
                if (token >= p.m || output >= p.n) continue;
                const int sum = kStep<Bits> * sums.at[i][tile][r];
                gpu::add(static_cast<int*>(p.y) + (int64_t)token * p.n + output, sum);
            }
}

// A of 16 tokens for part `part` of a step. Int8: k's 32 part .. + 31. Int4: all 64, of codes that 4 bits hold, in the order
// of Weights::nibbles: the order of k's within a product is free.
template <int Index, int Bits>
GPU_DEVICE void load_activations(const gpu::Shared<gpu::Vec16>& memory, int row, int tile, int part,
                                 uint32_t (&a)[4]) {
    if constexpr (Bits == 8) {
        gpu::ldmatrix_x4(a, memory, (row ^ 2 * part) + tile);
    } else {
        uint32_t x[2][4];  // register r of half h: row half r % 2, k's 32 h + 16 (r / 2) .. + 15
#pragma unroll
        for (int half = 0; half < 2; ++half) gpu::ldmatrix_x4(x[half], memory, (row ^ 2 * half) + tile);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int low = Weights<Index>::low(r / 2), high = Weights<Index>::high(r / 2);
            a[r] = (x[low / 2][low % 2 * 2 + r % 2] & 0x0F0F0F0Fu) |
                   (x[high / 2][high % 2 * 2 + r % 2] << 4 & 0xF0F0F0F0u);
        }
    }
}

enum class Of { whole, groups, slice };

// K is a multiple of 16, its groups of 32 (int4: 64); q and w are 16-byte aligned. Of::slice: sums of the block's part of K
// alone. Bits 4: on int4 tensor cores; codes of activations lie in -8 .. 7, weights have at most 4 bits.
template <int Index, int RowTiles, int WarpRows, int WarpColumns, Of of, int Bits = 8>
GPU_DEVICE void tile_gemm(const Ports& p) {
    using T = Tiling<Index, RowTiles, WarpRows, WarpColumns>;
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
    constexpr int parts = Bits == 4 ? 1 : 2;  // of a step
    const int group_parts = (int)(p.k / p.groups) / (d2d::kUnitDepth / parts);
    int done = 0, group = 0;
    int stage = 0, stage_before = (T::stages - 1) * T::stage;
    const int a_row = swizzled(warp_row + lane % 16, lane / 16);  // the second half of a step: XOR 2
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
                load_activations<Index, Bits>(memory, a_row, stage + 64 * i, part, a[i]);
#pragma unroll
            for (int tile = 0; tile < 4; ++tile) {
                if constexpr (Bits == 4) {
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
                    finish_group<Index, Bits>(p, column, group++, sums, value);
                    done = 0;
                }
            }
        }
        stage_before = stage;
        stage = stage == (T::stages - 1) * T::stage ? 0 : stage + T::stage;
    }
    const int row = first_row + lane_row;
    if constexpr (of == Of::slice) {
        add_sums<Bits>(p, row, column, sums);
        return;
    }
    if constexpr (of == Of::whole) finish_group<Index, Bits>(p, column, 0, sums, value);
    finish_tile<T>(p, memory, first_row, first_column, lane_row, lane_column, value);
}

}  // namespace
