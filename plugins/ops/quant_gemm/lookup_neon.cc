// Ternary GEMM by tbl, for NEON without byte dot products. Bounds for M 256, K 1152, N 4608 on one core at 1.5 GHz that
// starts one vector instruction a cycle; no such CPU was at hand to measure:
//   operations 1.36 G multiply-adds. A table holds the 9 sums of 2 weights; tbl and a sum of bytes, 2 instructions, do 16
//     outputs of 2 k's = 32 of them. Widening takes 7 instructions a stretch:
//       max |q| 7 (A4)  stretch 9: 25 instructions for 288: 17 G/s = 79 ms                              <- the bound
//     smlal does 8 by one instruction: 12 G/s (cpu_neon.cc)
//   bytes w 1.3 MB + q 0.3 MB + y 4.7 MB: 3 ms at 2 GB/s
// Rule, by these counts: up to max |q| 21, stretch 3, 96 by 13 instructions; at stretch 2, 64 by 11, smlal is ahead.
#include <arm_neon.h>

#include "lookups.h"

namespace d2d {
namespace {

// Bytes of one token and 4 vectors of outputs: sums += what the table has for the index. In assembly, since gcc 12 moves
// all look-ups before the first sum and runs out of registers.
[[gnu::always_inline]] inline void look_up(uint8x16_t (&sums)[4], const uint8_t* table,
                                           const uint8x16_t (&index)[4]) {
    uint8x16_t found[4], entries;
    asm volatile(
        "ldr %q8, [%9]\n\t"
        "tbl %4.16b, {%8.16b}, %10.16b\n\t"
        "tbl %5.16b, {%8.16b}, %11.16b\n\t"
        "tbl %6.16b, {%8.16b}, %12.16b\n\t"
        "tbl %7.16b, {%8.16b}, %13.16b\n\t"
        "add %0.16b, %0.16b, %4.16b\n\t"
        "add %1.16b, %1.16b, %5.16b\n\t"
        "add %2.16b, %2.16b, %6.16b\n\t"
        "add %3.16b, %3.16b, %7.16b"
        : "+w"(sums[0]), "+w"(sums[1]), "+w"(sums[2]), "+w"(sums[3]), "=&w"(found[0]), "=&w"(found[1]),
          "=&w"(found[2]), "=&w"(found[3]), "=&w"(entries)
        : "r"(table), "w"(index[0]), "w"(index[1]), "w"(index[2]), "w"(index[3]),
          "m"(*reinterpret_cast<const uint8_t (*)[16]>(table)));
}

struct Tables {
    static constexpr FormatSpec kFormat = kTernary;
    static constexpr int64_t kLanes = 16, kStepVectors = 4, kStepTokens = 2, kCodes = 2, kTableBytes = 16;
    static constexpr int64_t kLeastVectors = kStepVectors, kGroupTokens = 64, kMostTokens = 64;
    static constexpr int64_t kBlockChunks = 16, kMostOutputs = 1152;
    static constexpr int kMostLargest = 21;

    // 8 tables a chunk: 2 j + h of k's 8 h + j and 8 h + 4 + j. Entry d + 4 e belongs to their codes d, e.
    static void build(const int8_t* q, int64_t count, int64_t shift, uint8_t* to) {
        constexpr int8_t first[] = {-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, 0, 0, 0, 0};
        constexpr int8_t second[] = {-1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0};
        const int8x16_t one = vld1q_s8(first), other = vld1q_s8(second);
        const int8x16_t zero = vdupq_n_s8(static_cast<int8_t>(shift));
        for (int64_t chunk = 0; chunk < count; ++chunk, q += 16)
            for (int j = 0; j < 4; ++j)
                for (int half = 0; half < 2; ++half, to += 16) {
                    const int8_t* pair = q + 8 * half + j;
                    const int8x16_t sum = vmlaq_s8(zero, vdupq_n_s8(pair[0]), one);
                    vst1q_u8(to, vreinterpretq_u8_s8(vmlaq_s8(sum, vdupq_n_s8(pair[4]), other)));
                }
    }

    // Two bits of a byte are the code of one k: its nibbles are the index of two look-ups.
    static void order(const uint8_t* const* tiles, int, int64_t count, uint8_t* to) {
        for (int64_t chunk = 0; chunk < count; ++chunk)
            for (int vector = 0; vector < kStepVectors; ++vector) {
                const uint8x16x4_t by_k = vld4q_u8(tiles[vector] + chunk * kVector);
                uint8_t* at = to + (chunk * 8 * kStepVectors + vector) * kLanes;
                for (int j = 0; j < 4; ++j, at += 2 * kStepVectors * kLanes) {
                    const uint8x16_t codes =
                        vzip1q_u8(by_k.val[j], vextq_u8(by_k.val[j], by_k.val[j], kLanes / 2));
                    vst1q_u8(at, vandq_u8(codes, vdupq_n_u8(15)));
                    vst1q_u8(at + kStepVectors * kLanes, vshrq_n_u8(codes, 4));
                }
            }
    }

    static void add(const uint8_t* tables, int64_t stride, const uint8_t* index, int tokens, int,
                    int64_t lookups, int64_t stretch, bool begins, uint16_t* sums) {
        if (begins) std::memset(sums, 0, static_cast<size_t>(tokens * kStepVectors * kLanes) * sizeof(*sums));
        if (tokens == kStepTokens)
            return add_tokens<kStepTokens>(tables, stride, index, lookups, stretch, sums);
        for (; tokens; --tokens, tables += stride, sums += kStepVectors * kLanes)
            add_tokens<1>(tables, stride, index, lookups, stretch, sums);
    }

  private:
    // 8 sums, 4 index vectors, a table and what it gives. With 4 tokens gcc 12 spills 6 vectors a round: that costs more
    // than the loads of index vectors that 2 tokens share.
    template <int Tokens>
    static void add_tokens(const uint8_t* tables, int64_t stride, const uint8_t* index, int64_t lookups,
                           int64_t stretch, uint16_t* sums) {
        for (int64_t i = 0; i < lookups; i += stretch) {
            uint8x16_t bytes[Tokens][kStepVectors] = {};
            for (int64_t j = i; j < least(lookups, i + stretch); ++j) {
                uint8x16_t at[kStepVectors];
#pragma GCC unroll 4
                for (int v = 0; v < kStepVectors; ++v)
                    at[v] = vld1q_u8(index + (j * kStepVectors + v) * kLanes);
#pragma GCC unroll 4
                for (int t = 0; t < Tokens; ++t) look_up(bytes[t], tables + t * stride + j * kTableBytes, at);
            }
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
                for (int v = 0; v < kStepVectors; ++v)
                    widen(bytes[t][v], sums + (t * kStepVectors + v) * kLanes);
        }
    }

    static void widen(uint8x16_t bytes, uint16_t* sums) {
        const uint16x8_t both = vreinterpretq_u16_u8(bytes);
        vst1q_u16(sums, vaddq_u16(vld1q_u16(sums), both));
        vst1q_u16(sums + 8, vsraq_n_u16(vld1q_u16(sums + 8), both, 8));
    }
};

}  // namespace

std::unique_ptr<CpuKernel> make_lookup_neon(const FormatSpec& format, std::unique_ptr<CpuKernel> rest,
                                            GemmTerms terms) {
    if (format.radix != 3) return rest;
    return std::unique_ptr<CpuKernel>(new LookupGemm<Tables>(std::move(rest), terms));
}

}  // namespace d2d
