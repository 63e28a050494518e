// The GEMMs for AVX-512 with VNNI. Example: M 256, K 1152, N 4608 on one core of a 3.6 GHz Zen 4 (one
// vpdpbusd a cycle).
//   operations 1.36 G multiply-adds / (64 * 3.6 GHz) = 5.9 ms   <- the bound
//   bytes w 1.3 MB (ternary) .. 5.3 MB (int8) + q 0.3 MB + y 4.7 MB: below 0.6 ms at 20 GB/s
// vpdpbusd takes unsigned codes and signed activations and is exact in int32 for every format: one
// micro-kernel for all. Ternary and int3 by narrow activations are looked up where there is VBMI: lookup_avx512.cc. Compiles against SIMDe as well (D2D_SIMDE), so that it is tested on any machine.
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

template <int Tokens>
void add_tokens(const int8_t* q, int64_t stride, const uint8_t* weights, int64_t quads, int32_t* dots) {
    __m512i sums[Tokens];
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t) sums[t] = _mm512_loadu_si512(dots + t * kTile);
    for (int64_t i = 0; i < quads; ++i) {
        const __m512i codes = _mm512_loadu_si512(weights + i * kVector);
#pragma GCC unroll 12
        for (int t = 0; t < Tokens; ++t)
            sums[t] = _mm512_dpbusd_epi32(sums[t], codes, broadcast(q + t * stride + 4 * i));
    }
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t) _mm512_storeu_si512(dots + t * kTile, sums[t]);
}

class Micro {
  public:
    static constexpr int kTokens = 12;
    static constexpr bool kAsksForLargest = false;  // exact for all codes

    Micro(const FormatSpec&, int) {}

    bool wide() const { return false; }
    bool centred() const { return false; }

    void add(const int8_t* q, int64_t stride, const uint8_t* weights, int tokens, int64_t quads,
             int32_t* dots) const {
        for (; tokens >= 12; tokens -= 12, q += 12 * stride, dots += 12 * kTile)
            add_tokens<12>(q, stride, weights, quads, dots);
        for (; tokens >= 4; tokens -= 4, q += 4 * stride, dots += 4 * kTile)
            add_tokens<4>(q, stride, weights, quads, dots);
        for (; tokens; --tokens, q += stride, dots += kTile) add_tokens<1>(q, stride, weights, quads, dots);
    }
};

}  // namespace

std::unique_ptr<CpuKernel> make_quant_gemm_avx512(const FormatSpec& format, const Attributes& attributes,
                                                  GemmTerms terms) {
    auto tiled = make_tiled<Micro>(format, attributes, terms);
    return vbmi_runs_here() ? make_lookup_avx512(format, std::move(tiled), terms) : std::move(tiled);
}

}  // namespace d2d
