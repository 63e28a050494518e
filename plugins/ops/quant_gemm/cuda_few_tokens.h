// <Format>Gemm for up to 16 tokens: bound by the bytes of the weights, so each is read once, straight into registers.
//
// A block computes 32 outputs for all tokens. Its warps share K: without groups unit by unit in turn, with groups a
// group at a time. Weights are the A of mma.m16n8k32 (two of their tiles are 16 outputs), tokens are B, 8 at a time. Packed
// codes are at the top of their bytes there, which makes sums 16 times as large.
#pragma once

#include "cuda_parts.h"

namespace {

constexpr int kFewTokens = 16;
constexpr int kFewWarps = 8;
constexpr int kPitch = 36;  // of a token's 32 sums: the lanes of a store meet no bank twice

template <bool Grouped>
struct Partial {
    using Type = int;
};
template <>
struct Partial<true> {
    using Type = float;
};

// B of a token's unit: the codes at `from` are the lane's first.
GPU_DEVICE void load_tokens(const int8_t* from, bool packed, uint32_t (&b)[4]) {
    const auto* words = reinterpret_cast<const uint32_t*>(from);  // 16 codes a lane are four of them, or two
    if (packed) {
        const uint32_t both[2] = {gpu::load(words), gpu::load(words + 4)};
#pragma unroll
        for (int r = 0; r < 4; ++r) b[r] = codes_as_bytes(both[r % 2], r / 2);
    } else {
#pragma unroll
        for (int r = 0; r < 4; ++r) b[r] = gpu::load(words + 4 * r);
    }
}

// Adds the products of units first, first + stride, .. below end to sums [16 outputs][8 tokens][register of D].
template <int Index>
GPU_DEVICE void add_units(const Ports& p, int64_t strip, int first, int end, int stride, int lane,
                          int (&sums)[2][2][4]) {
    using W = Weights<Index>;
    constexpr int ahead = 16 / W::words ? 16 / W::words : 1;  // 64 bytes of a lane are under way at once
    const int32_t* units = p.w + strip * d2d::strip_units(p.k) * (W::words * kWarp);
    const bool packed = p.packed != 0;
    const int unit_bytes = packed ? 32 : 64;
    const int8_t* tokens[2];  // tokens beyond M repeat the last one: nobody reads their sums
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
        const int64_t token = 8 * eight + lane / 4;
        tokens[eight] = p.q + (token < p.m ? token : p.m - 1) * (packed ? p.k / 2 : p.k) + 4 * (lane % 4);
    }
#pragma unroll 1
    for (int start = first; start < end; start += ahead * stride) {
        W weights[ahead];
#pragma unroll
        for (int i = 0; i < ahead; ++i)
            if (start + i * stride < end)
                weights[i].from_global(units + (start + i * stride) * (W::words * kWarp), lane);
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            const int unit = start + i * stride;
            if (unit >= end) break;  // all lanes of the warp
            uint32_t b[2][4];
#pragma unroll
            for (int eight = 0; eight < 2; ++eight)
                load_tokens(tokens[eight] + unit_bytes * unit, packed, b[eight]);
#pragma unroll
            for (int pair = 0; pair < 2; ++pair)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t a[4] = {weights[i].fragment(2 * pair, 2 * half),
                                           weights[i].fragment(2 * pair + 1, 2 * half),
                                           weights[i].fragment(2 * pair, 2 * half + 1),
                                           weights[i].fragment(2 * pair + 1, 2 * half + 1)};
#pragma unroll
                    for (int eight = 0; eight < 2; ++eight)
                        gpu::mma_16_8_32(sums[pair][eight], a, b[eight][2 * half], b[eight][2 * half + 1]);
                }
        }
    }
}

// K, with Grouped its groups, is a multiple of 64; q and w are 16-byte aligned; at most 16 tokens.
template <int Index, bool Grouped>
GPU_DEVICE void few_tokens_gemm(const Ports& p) {
    using Sum = typename Partial<Grouped>::Type;
    GPU_SHARED(Sum, partial, kFewWarps * kFewTokens * kPitch);
    const int me = (int)gpu::thread(), lane = me % kWarp, warp = me / kWarp;
    const int64_t strip = gpu::block_x();
    const float scale = Weights<Index>::scale * (p.packed ? 1.0f / 16 : 1.0f);
    Sum mine[2][2][4] = {};
    if constexpr (Grouped) {
        const int units = (int)(p.k / p.groups) / d2d::kUnitDepth;
        for (int group = warp; group < p.groups; group += kFewWarps) {
            int sums[2][2][4] = {};
            add_units<Index>(p, strip, group * units, (group + 1) * units, 1, lane, sums);
#pragma unroll
            for (int pair = 0; pair < 2; ++pair)
#pragma unroll
                for (int below = 0; below < 2; ++below) {
                    const int64_t output = strip * d2d::kUnitOutputs + 16 * pair + 8 * below + lane / 4;
                    const float ws =
                        output < p.n ? scale * gpu::load(p.ws + output * p.groups + group) : 0.0f;
#pragma unroll
                    for (int eight = 0; eight < 2; ++eight)
#pragma unroll
                        for (int odd = 0; odd < 2; ++odd)
                            mine[pair][eight][2 * below + odd] +=
                                (float)sums[pair][eight][2 * below + odd] * ws;
                }
        }
    } else {
        add_units<Index>(p, strip, warp, (int)d2d::strip_units(p.k), kFewWarps, lane, mine);
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
#pragma unroll
        for (int eight = 0; eight < 2; ++eight)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int token = 8 * eight + 2 * (lane % 4) + r % 2,
                          output = 16 * pair + lane / 4 + 8 * (r / 2);
                partial.store((warp * kFewTokens + token) * kPitch + output, mine[pair][eight][r]);
            }
    gpu::sync_block();
    const int64_t output = strip * d2d::kUnitOutputs + lane;
    if (output >= p.n) return;
    const float bias = gpu::load(p.bias + output);
#pragma unroll 1
    for (int64_t token = warp; token < p.m; token += kFewWarps) {
        Sum sum = 0;
#pragma unroll
        for (int i = 0; i < kFewWarps; ++i) sum += partial.load((i * kFewTokens + token) * kPitch + lane);
        float value = (float)sum;
        if constexpr (!Grouped) value = value * scale * gpu::load(p.ws + output);
        value = value * gpu::load(p.s + token) + bias;
        for (int64_t r = 0; r < p.rank; ++r)
            value = gpu::multiply_add(gpu::load(p.t + token * p.rank + r),
                                      gpu::load(p.up + output * p.rank + r), value);
        store_element(p.y, token * p.n + output, p.dtype, stream_of(p, token).joined(output, value));
    }
}

}  // namespace
