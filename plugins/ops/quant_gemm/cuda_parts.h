// What the tensor-core kernels of <Format>Gemm share: their ports, and the weights of a lane.
#pragma once

#include "elements.h"
#include "fragments.h"
#include "gpu.h"

// The parameters of every kernel.
#define PORTS                                                                                              \
    const int8_t *q, const float *s, const int32_t *w, const float *ws, const float *bias, const float *t, \
        const float *up, void *y, int64_t m, int64_t n, int64_t k, int64_t groups, int64_t rank,           \
        const void *residual, const void *gate, int64_t tokens_a_gate, int64_t dtype, int64_t packed
#define GIVEN \
    Ports { q, s, w, ws, bias, t, up, y, m, n, k, groups, rank, residual, gate, tokens_a_gate, dtype, packed }

namespace {

constexpr int kWarp = 32;

// As GemmProblem in quant_gemm.h.
struct Ports {
    const int8_t* q;
    const float* s;
    const int32_t* w;
    const float* ws;
    const float* bias;
    const float* t;
    const float* up;
    void* y;
    int64_t m, n, k, groups, rank;
    const void* residual;
    const void* gate;
    int64_t tokens_a_gate;
    int64_t dtype;   // of y, residual and gate (elements.h)
    int64_t packed;  // two codes a byte of q
};

// For code of its own where the type is a constant.
GPU_DEVICE Ports with_dtype(Ports p, int64_t dtype) {
    p.dtype = dtype;
    return p;
}

// Of a token: where its rows of residual and gate are.
struct Stream {
    const void* residual;
    const void* gate;
    int64_t dtype;

    // y of values v of outputs from `output`: residual + gate v, or v.
    GPU_DEVICE float joined(int64_t output, float v) const {
        if (!residual) return v;
        return load_element(residual, output, dtype) + load_element(gate, output, dtype) * v;
    }
    GPU_DEVICE gpu::Float2 joined(int64_t output, const gpu::Float2& v) const {
        const gpu::Float2 before = load_pair(residual, output, dtype);
        const gpu::Float2 factor = load_pair(gate, output, dtype);
        return {before.x + factor.x * v.x, before.y + factor.y * v.y};
    }
};

GPU_DEVICE Stream stream_of(const Ports& p, int64_t token) {
    if (!p.residual) return {nullptr, nullptr, p.dtype};
    const int64_t sample = (uint32_t)token / (uint32_t)p.tokens_a_gate;
    return {element(p.residual, token * p.n, p.dtype), element(p.gate, sample * p.n, p.dtype), p.dtype};
}

// What tensor cores multiply: codes of a byte each; packed ones (op.h) as nibbles; or, on a GPU without int4 tensor cores,
// each packed one at the top of a byte.
enum class Codes { bytes, nibbles, nibbles_as_bytes };

// Of four bytes of packed codes: those of k's 0 .. 31 of their run of 64 (part 0) or 32 .. 63, each at the top of a byte.
GPU_DEVICE uint32_t codes_as_bytes(uint32_t packed, int part) {
    return (part ? packed : packed << 4) & 0xF0F0F0F0u;
}

// One unit's weights of a lane (fragments.h), packed; unpacked a register, that is four weights, at a time.
template <int Index>
struct Weights {
    static constexpr int bits = d2d::weight_bits(d2d::kFormats[Index]);
    static constexpr int words = d2d::lane_words(d2d::kFormats[Index]);
    static constexpr int at_once = d2d::load_words(d2d::kFormats[Index]);
    static constexpr int pieces = words * kWarp / 4;  // a unit in pieces of 16 bytes
    // Of what `fragment` gives: the weights stand at the top of their bytes. A power of two, so nothing is rounded.
    static constexpr float scale = 1.0f / (1 << (8 - bits));

    uint32_t word[words];

    GPU_DEVICE void set(int i, const gpu::Vec16& v) {
        word[4 * i] = v.x;
        word[4 * i + 1] = v.y;
        word[4 * i + 2] = v.z;
        word[4 * i + 3] = v.w;
    }
    GPU_DEVICE void set(int i, const gpu::Vec8& v) {
        word[2 * i] = v.x;
        word[2 * i + 1] = v.y;
    }

    // From the unit that begins at piece `first` of a shared array.
    GPU_DEVICE void from_shared(const gpu::Shared<gpu::Vec16>& memory, int first, int lane) {
#pragma unroll
        for (int i = 0; i < words / at_once; ++i) {
            if constexpr (at_once == 4)
                set(i, memory.load(first + i * kWarp + lane));
            else
                set(i, memory.template load_part<gpu::Vec8>(2 * first + i * kWarp + lane));
        }
    }

    GPU_DEVICE void from_global(const int32_t* unit, int lane) {
#pragma unroll
        for (int i = 0; i < words / at_once; ++i) {
            if constexpr (at_once == 4)
                set(i, gpu::load_once(reinterpret_cast<const gpu::Vec16*>(unit) + i * kWarp + lane));
            else
                set(i, gpu::load_once(reinterpret_cast<const gpu::Vec8*>(unit) + i * kWarp + lane));
        }
    }

    // Of at most 4 bits: register reg (0, 1) of a tile for the int4 tensor cores, each nibble w << (4 - bits): the weights of
    // registers reg (low) and reg + 2 (high) of `fragment`.
    GPU_DEVICE uint32_t nibbles(int tile, int reg) const {
        if constexpr (bits == 4) {
            return word[2 * tile + reg];
        } else if constexpr (bits == 2) {
            return (reg ? word[tile] : word[tile] << 2) & 0xCCCCCCCCu;
        } else {
            const uint32_t* w = word + tile / 2 * 3;
            if (tile % 2 == 0)
                return reg ? (w[1] & 0xE0E0E0E0u) | (w[0] >> 1 & 0x0E0E0E0Eu)
                           : (w[2] & 0xE0E0E0E0u) | (w[0] >> 4 & 0x0E0E0E0Eu);
            return reg ? (w[2] << 3 & 0xE0E0E0E0u) | (w[2] << 2 & 0x0C0C0C0Cu) | (w[1] & 0x02020202u)
                       : (w[0] << 6 & 0xC0C0C0C0u) | (w[1] << 5 & 0x20202020u) | (w[1] >> 1 & 0x0E0E0E0Eu);
        }
    }

    // Register reg of a tile, each byte w << (8 - bits). Both are constants once loops are unrolled.
    GPU_DEVICE uint32_t fragment(int tile, int reg) const {
        if constexpr (bits == 3) {
            const uint32_t* w = word + tile / 2 * 3;
            const int index = d2d::int3_register(tile, reg);
            if (index < 3) return w[index] & 0xE0E0E0E0u;
            if (index < 6) return w[index - 3] << 3 & 0xE0E0E0E0u;
            const uint32_t high = index == 6 ? w[0] << 6 : w[2] << 6;
            const uint32_t low = index == 6 ? w[1] << 5 : w[1] << 4;
            return (high & 0xC0C0C0C0u) | (low & 0x20202020u);
        } else if constexpr (bits == 8) {
            return word[4 * tile + reg];
        } else {
            constexpr int words = d2d::tile_words(bits);
            constexpr uint32_t mask = 0x01010101u * (256 - (1 << (8 - bits)));
            return word[words * tile + reg % words] << (8 - bits - reg / words * bits) & mask;
        }
    }
};

}  // namespace
