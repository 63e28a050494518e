// The GEMMs for AVX-512 with VNNI. Example: M 256, K 1152, N 4608 on one core of a 3.6 GHz Zen 4 (one
// vpdpbusd a cycle).
//   operations 1.36 G multiply-adds / (64 * 3.6 GHz) = 5.9 ms   <- the bound
//   bytes w 1.3 MB (ternary) .. 5.3 MB (int8) + q 0.3 MB + y 4.7 MB: below 0.6 ms at 20 GB/s
// vpdpbusd takes unsigned codes and signed activations and is exact in int32 for every format; weights are
// unpacked in registers once for kTokens tokens. Compiles against SIMDe as well (D2D_SIMDE), so that it is
// tested on any machine.
#if defined(D2D_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include "tiles.h"

namespace d2d {
namespace {

inline __m512i load(const uint8_t* from) { return _mm512_loadu_si512(from); }

inline __m512i broadcast(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}

template <int Bits>
inline __m512i shift_right(__m512i v) {
    if constexpr (Bits > 0)
        return _mm512_srli_epi32(v, Bits);
    else
        return v;
}

// Codes of quad `Quad` of a chunk, 16 outputs.
template <int Index, int Quad>
inline __m512i codes(const uint8_t* chunk) {
    if constexpr (Index == 0)
        return _mm512_and_si512(shift_right<2 * Quad>(load(chunk)), _mm512_set1_epi8(3));
    if constexpr (Index == 1) {
        const __m512i low = _mm512_and_si512(shift_right<2 * (Quad % 4)>(load(chunk + Quad / 4 * kVector)),
                                             _mm512_set1_epi8(3));
        const __m512i high =
            _mm512_and_si512(shift_right<Quad>(load(chunk + 2 * kVector)), _mm512_set1_epi8(1));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 2));
    }
    if constexpr (Index == 2)
        return _mm512_and_si512(shift_right<4 * Quad>(load(chunk)), _mm512_set1_epi8(15));
    return load(chunk);
}

template <int Index, int Tokens, int Quad = 0>
inline void add_chunk(const uint8_t* chunk, const int8_t* q, int64_t stride, __m512i (&sums)[Tokens]) {
    if constexpr (Quad < chunk_shape(kFormats[Index]).quads) {
        const __m512i weights = codes<Index, Quad>(chunk);
#pragma GCC unroll 12
        for (int t = 0; t < Tokens; ++t)
            sums[t] = _mm512_dpbusd_epi32(sums[t], weights, broadcast(q + t * stride + 4 * Quad));
        add_chunk<Index, Tokens, Quad + 1>(chunk, q, stride, sums);
    }
}

template <int Index, int Tokens>
void dot_tokens(const uint8_t* weights, const int8_t* q, int64_t stride, int64_t count,
                int32_t (*dots)[kTile]) {
    constexpr ChunkShape shape = chunk_shape(kFormats[Index]);
    __m512i sums[Tokens];
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t) sums[t] = _mm512_setzero_si512();
    for (int64_t c = 0; c < count; ++c)
        add_chunk<Index, Tokens>(weights + c * shape.vectors * kVector, q + c * 4 * shape.quads, stride,
                                 sums);
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t) _mm512_store_si512(dots[t], sums[t]);
}

class Micro {
  public:
    static constexpr int kTokens = 12;

    explicit Micro(int) {}

    int32_t offset(const FormatSpec& format) const { return format.offset; }

    template <int Index>
    void dot(const uint8_t* weights, const int8_t* q, int64_t stride, int tokens, int64_t count,
             int32_t (*dots)[kTile]) const {
        for (; tokens >= 12; tokens -= 12, q += 12 * stride, dots += 12)
            dot_tokens<Index, 12>(weights, q, stride, count, dots);
        for (; tokens >= 4; tokens -= 4, q += 4 * stride, dots += 4)
            dot_tokens<Index, 4>(weights, q, stride, count, dots);
        for (; tokens; --tokens, q += stride, ++dots) dot_tokens<Index, 1>(weights, q, stride, count, dots);
    }
};

}  // namespace

std::unique_ptr<CpuKernel> make_quant_gemm_avx512(const FormatSpec& format, const Attributes& attributes,
                                                  bool low_rank) {
    return make_tiled<Micro>(format, attributes, low_rank);
}

}  // namespace d2d
