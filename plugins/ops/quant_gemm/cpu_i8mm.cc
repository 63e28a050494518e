// The GEMMs for NEON with byte matrix products (Armv8.6: Cortex-A710, Neoverse V1 and N2, Grace). Bounds for M 256, K 1152,
// N 4608 on one core at 2.6 GHz with four vector pipes, two of them for matrices; no such CPU was at hand to measure:
//   operations 1.36 G multiply-adds, 32 an instruction, 166 G/s = 8 ms                               <- the bound
//   bytes w 1.3 MB (ternary) .. 5.3 MB (int8) + q 0.3 MB + y 4.7 MB: below 0.6 ms at 20 GB/s
// usmmla multiplies 2 outputs by 8 k's of unsigned codes with 8 k's by 2 tokens of signed activations, exact in int32 for
// every format. Its outputs have 8 k's side by side: two quads, of 4 k's each, are interleaved once for all tokens.
#include <arm_neon.h>

#include "tiles.h"

namespace d2d {
namespace {

// 8 k's of a token; zeros for the last 4 where there is no second quad.
inline int8x8_t activations(const int8_t* q, bool second) {
    if (second) return vld1_s8(q);
    uint32_t four;
    std::memcpy(&four, q, sizeof(four));
    return vcreate_s8(four);
}

// Pairs of tokens; of the last pair of an odd number, both are the last token, and one of them is not written.
template <int Pairs>
void add_pairs(const int8_t* q, int64_t stride, const uint8_t* weights, int tokens, int64_t quads,
               int32_t* dots) {
    int32x4_t sums[Pairs][8] = {};  // [pair][two outputs]: output 0 of both tokens, output 1 of both
    for (int64_t i = 0; i < quads; i += 2) {
        const bool second = i + 1 < quads;
        uint8x16_t codes[8];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const uint8_t* from = weights + i * kVector + 16 * v;
            const uint32x4_t low = vreinterpretq_u32_u8(vld1q_u8(from));
            const uint32x4_t high = second ? vreinterpretq_u32_u8(vld1q_u8(from + kVector)) : vdupq_n_u32(0);
            codes[2 * v] = vreinterpretq_u8_u32(vzip1q_u32(low, high));
            codes[2 * v + 1] = vreinterpretq_u8_u32(vzip2q_u32(low, high));
        }
#pragma GCC unroll 2
        for (int pair = 0; pair < Pairs; ++pair) {
            const int8_t* first = q + 2 * pair * stride + 4 * i;
            const int8_t* other = first + (2 * pair + 1 < tokens ? stride : 0);
            const int8x16_t both = vcombine_s8(activations(first, second), activations(other, second));
#pragma GCC unroll 8
            for (int v = 0; v < 8; ++v) sums[pair][v] = vusmmlaq_s32(sums[pair][v], codes[v], both);
        }
    }
#pragma GCC unroll 2
    for (int pair = 0; pair < Pairs; ++pair)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
            for (int half = 0; half < (2 * pair + 1 < tokens ? 2 : 1); ++half) {
                const int32x4_t low = sums[pair][2 * v], high = sums[pair][2 * v + 1];
                int32_t* const to = dots + (2 * pair + half) * kTile + 4 * v;
                vst1q_s32(to, vaddq_s32(vld1q_s32(to), half ? vuzp2q_s32(low, high) : vuzp1q_s32(low, high)));
            }
}

class Micro {
  public:
    static constexpr int kTiles = 1;
    static constexpr int kTokens = 4;  // 16 sums, 8 weights and an activation of 32 registers
    static constexpr bool kAsksForLargest = false;

    Micro(const FormatSpec&, int) {}

    bool wide() const { return false; }
    bool centred() const { return false; }

    void add(const int8_t* q, int64_t stride, const uint8_t* weights, int tokens, int64_t quads,
             int32_t* dots) const {
        (tokens > 2 ? add_pairs<2> : add_pairs<1>)(q, stride, weights, tokens, quads, dots);
    }
};

}  // namespace

std::unique_ptr<CpuKernel> make_quant_gemm_i8mm(const FormatSpec& format, const Attributes& attributes,
                                                GemmTerms terms) {
    return make_tiled<Micro>(format, attributes, terms);
}

}  // namespace d2d
