// The GEMMs for NEON with byte dot products (Armv8.2: Cortex-A76 and A78 as in Jetson Orin, Neoverse N1). Bounds for
// M 256, K 1152, N 4608 on one core at 2.2 GHz with two vector pipes; no such CPU was at hand to measure:
//   operations 1.36 G multiply-adds, 16 an instruction, 70 G/s = 19 ms                               <- the bound
//   bytes w 1.3 MB (ternary) .. 5.3 MB (int8) + q 0.3 MB + y 4.7 MB: below 1 ms at 10 GB/s
// Table look-ups do 32 multiply-adds by two instructions as well, and make tables besides: they would not win here.
// sdot takes signed bytes: codes up to 15 are, those of int8 are made weights, code - 128. Exact in int32.
#include "neon.h"
#include "tiles.h"

namespace d2d {
namespace {

// One token, 16 outputs: sums += products of the 4 bytes at q. In assembly, since gcc 12 moves the loads of all tokens
// before the first product, through general registers, and runs out of vectors.
[[gnu::always_inline]] inline void add_quad(const int8_t* q, const Codes& codes, int32x4_t (&sums)[4]) {
    int8x16_t token;
    asm volatile(
        "ld1r {%4.4s}, [%5]\n\t"
        "sdot %0.4s, %6.16b, %4.16b\n\t"
        "sdot %1.4s, %7.16b, %4.16b\n\t"
        "sdot %2.4s, %8.16b, %4.16b\n\t"
        "sdot %3.4s, %9.16b, %4.16b"
        : "+w"(sums[0]), "+w"(sums[1]), "+w"(sums[2]), "+w"(sums[3]), "=&w"(token)
        : "r"(q), "w"(codes.of[0]), "w"(codes.of[1]), "w"(codes.of[2]), "w"(codes.of[3]),
          "m"(*reinterpret_cast<const int8_t (*)[4]>(q)));
}

template <int Tokens, bool Centred>
void add_tokens(const int8_t* q, int64_t stride, const uint8_t* weights, int64_t quads, int32_t* dots) {
    int32x4_t sums[Tokens][4];
#pragma GCC unroll 6
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sums[t][v] = vld1q_s32(dots + t * kTile + 4 * v);
    for (int64_t i = 0; i < quads; ++i) {
        const Codes codes = load_codes<Centred>(weights + i * kVector);
#pragma GCC unroll 6
        for (int t = 0; t < Tokens; ++t) {
            add_quad(q + t * stride + 4 * i, codes, sums[t]);
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) vst1q_s32(dots + t * kTile + 4 * v, sums[t][v]);
}

class Micro {
  public:
    static constexpr int kTiles = 1;
    static constexpr int kTokens = 6;  // 24 sums, 4 weights and an activation of 32 registers
    static constexpr bool kAsksForLargest = false;

    Micro(const FormatSpec& format, int) : centred_(format.radix == 256) {}

    bool wide() const { return false; }
    bool centred() const { return centred_; }

    void add(const int8_t* q, int64_t stride, const uint8_t* weights, int tokens, int64_t quads,
             int32_t* dots) const {
        const auto six = centred_ ? add_tokens<6, true> : add_tokens<6, false>;
        const auto one = centred_ ? add_tokens<1, true> : add_tokens<1, false>;
        if (tokens == 6) return six(q, stride, weights, quads, dots);
        for (; tokens; --tokens, q += stride, dots += kTile) one(q, stride, weights, quads, dots);
    }

  private:
    bool centred_;
};

}  // namespace

std::unique_ptr<CpuKernel> make_quant_gemm_dotprod(const FormatSpec& format, const Attributes& attributes,
                                                   GemmTerms terms) {
    return make_tiled<Micro>(format, attributes, terms);
}

}  // namespace d2d
