// The GEMMs for AVX-512 with VNNI. Example: M 256, K 1152, N 4608 on one core of a 3.6 GHz Zen 4 (one
// vpdpbusd a cycle).
//   operations 1.36 G multiply-adds / (64 * 3.6 GHz) = 5.9 ms   <- the bound
//   bytes w 1.3 MB (ternary) .. 5.3 MB (int8) + q 0.3 MB + y 4.7 MB: below 0.6 ms at 20 GB/s
// Measured on such a core: int8 7.3 ms, 80 % of it; six tokens by four tiles, since one load serves four to six products (one
// tile at a time: 8.2 ms).
// vpdpbusd takes unsigned codes and signed activations and is exact in int32 for every format: one
// micro-kernel for all. Ternary and int3 by narrow activations are looked up where there is VBMI: lookup_avx512.cc.
// Compiles against SIMDe as well (D2D_SIMDE), so that it is tested on any machine.
#if defined(D2D_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include "tiles.h"

namespace d2d {
namespace {

inline __m512i broadcast(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}

// Written out, since gcc 12 otherwise stores every sum after each addition.
inline void add_products(__m512i& sum, __m512i codes, __m512i four) {
#if defined(D2D_SIMDE)
    sum = _mm512_dpbusd_epi32(sum, codes, four);
#else
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(four));
#endif
}

// 24 sums, 4 weights and an activation of 32 registers: 10 loads for 24 products.
template <int Tokens, int Tiles>
[[gnu::noinline]] void add_tokens(const int8_t* q, int64_t stride, const uint8_t* weights, int64_t tile_bytes,
                                  int64_t quads, int32_t* dots, int64_t tile_dots) {
    __m512i sums[Tokens][Tiles];
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int j = 0; j < Tiles; ++j) sums[t][j] = _mm512_loadu_si512(dots + j * tile_dots + t * kTile);
    for (int64_t i = 0; i < quads; ++i) {
        __m512i codes[Tiles];
#pragma GCC unroll 4
        for (int j = 0; j < Tiles; ++j) codes[j] = _mm512_loadu_si512(weights + j * tile_bytes + i * kVector);
#pragma GCC unroll 12
        for (int t = 0; t < Tokens; ++t) {
            const __m512i four = broadcast(q + t * stride + 4 * i);
#pragma GCC unroll 4
            for (int j = 0; j < Tiles; ++j) add_products(sums[t][j], codes[j], four);
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int j = 0; j < Tiles; ++j) _mm512_storeu_si512(dots + j * tile_dots + t * kTile, sums[t][j]);
}

class Micro {
  public:
    static constexpr int kTokens = 12, kTiles = 4;
    static constexpr bool kAsksForLargest = false;  // exact for all codes

    Micro(const FormatSpec&, int) {}

    bool wide() const { return false; }
    bool centred() const { return false; }

    void add(const int8_t* q, int64_t stride, const uint8_t* weights, int tokens, int64_t quads,
             int32_t* dots) const {
        tokens = add_all<12, 1>(q, stride, weights, 0, tokens, quads, dots, 0);
        tokens = add_all<4, 1>(q, stride, weights, 0, tokens, quads, dots, 0);
        add_all<1, 1>(q, stride, weights, 0, tokens, quads, dots, 0);
    }

    void add_tiles(const int8_t* q, int64_t stride, const uint8_t* weights, int64_t tile_bytes, int tokens,
                   int64_t quads, int32_t* dots, int64_t tile_dots) const {
        tokens = add_all<6, kTiles>(q, stride, weights, tile_bytes, tokens, quads, dots, tile_dots);
        tokens = add_all<2, kTiles>(q, stride, weights, tile_bytes, tokens, quads, dots, tile_dots);
        add_all<1, kTiles>(q, stride, weights, tile_bytes, tokens, quads, dots, tile_dots);
    }

  private:
    // As many times `Tokens` as there are; the rest is left.
    template <int Tokens, int Tiles>
    static int add_all(const int8_t*& q, int64_t stride, const uint8_t* weights, int64_t tile_bytes,
                       int tokens, int64_t quads, int32_t*& dots, int64_t tile_dots) {
        for (; tokens >= Tokens; tokens -= Tokens, q += Tokens * stride, dots += Tokens * kTile)
            add_tokens<Tokens, Tiles>(q, stride, weights, tile_bytes, quads, dots, tile_dots);
        return tokens;
    }
};

}  // namespace

std::unique_ptr<CpuKernel> make_quant_gemm_avx512(const FormatSpec& format, const Attributes& attributes,
                                                  GemmTerms terms) {
    auto tiled = make_tiled<Micro>(format, attributes, terms);
    return vbmi_runs_here() ? make_lookup_avx512(format, std::move(tiled), terms) : std::move(tiled);
}

}  // namespace d2d
