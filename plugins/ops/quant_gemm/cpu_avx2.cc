// The GEMMs for AVX2. Example: M 256, K 1152, N 4608 ternary on one core of a 2.6 GHz Zen 3, operands in the
// caches.
//   operations 1.36 G multiply-adds; vpmaddubsw makes 32 of them, two issue a cycle: 166 G/s = 8.2 ms   <-
//   the bound bytes w 1.3 MB (2 bits) + q 0.3 MB + y 4.7 MB = 6.3 MB / 20 GB/s                        = 0.3
//   ms
// vpmaddubsw multiplies unsigned codes by signed activations and adds pairs in int16: exact as long as the
// sums fit, which is what `bits` decides. Narrow codes add up in int16 over many quads before they are
// widened (2 instructions for 32 multiply-adds, against the 3 of an int8 kernel); int8 by 8-bit activations
// has no room: there |w| * sign(q, w) keeps a pair below 2 * 128 * 127 < 2**15 and is widened at once.
#include <immintrin.h>

#include "tiles.h"

namespace d2d {
namespace {

inline __m256i load(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

inline __m256i broadcast(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm256_set1_epi32(four);
}

// Keeps what comes before in the order of the source: left alone, gcc 12 computes all products of a chunk
// first and has to spill them to the stack, which halves the speed.
inline void in_order(__m256i& value) { asm volatile("" : "+x"(value)); }

// Codes of quad `Quad` of a chunk, outputs 8 * half .. 8 * half + 7.
template <int Index, int Quad>
inline __m256i codes(const uint8_t* chunk, int half) {
    const uint8_t* at = chunk + 32 * half;
    if constexpr (Index == 0)
        return _mm256_and_si256(_mm256_srli_epi16(load(at), 2 * Quad), _mm256_set1_epi8(3));
    if constexpr (Index == 1) {
        const __m256i low = _mm256_and_si256(_mm256_srli_epi16(load(at + Quad / 4 * kVector), 2 * (Quad % 4)),
                                             _mm256_set1_epi8(3));
        const __m256i plane = load(at + 2 * kVector);
        const __m256i shifted = Quad < 2 ? _mm256_slli_epi16(plane, 2 - (Quad < 2 ? Quad : 2))
                                         : _mm256_srli_epi16(plane, Quad < 2 ? 0 : Quad - 2);
        return _mm256_or_si256(low, _mm256_and_si256(shifted, _mm256_set1_epi8(4)));
    }
    if constexpr (Index == 2)
        return _mm256_and_si256(_mm256_srli_epi16(load(at), 4 * Quad), _mm256_set1_epi8(15));
    return load(at);
}

// Adds one chunk's products to the int16 sums of Tokens tokens.
template <int Index, int Tokens, int Quad = 0>
inline void add_chunk(const uint8_t* chunk, const int8_t* q, int64_t stride, __m256i (&sums)[Tokens][2]) {
    if constexpr (Quad < chunk_shape(kFormats[Index]).quads) {
        __m256i first = codes<Index, Quad>(chunk, 0), second = codes<Index, Quad>(chunk, 1);
        in_order(first);
        in_order(second);
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) {
            __m256i four = broadcast(q + t * stride + 4 * Quad);
            in_order(four);
            sums[t][0] = _mm256_add_epi16(sums[t][0], _mm256_maddubs_epi16(first, four));
            in_order(sums[t][0]);
            sums[t][1] = _mm256_add_epi16(sums[t][1], _mm256_maddubs_epi16(second, four));
            in_order(sums[t][1]);
        }
        add_chunk<Index, Tokens, Quad + 1>(chunk, q, stride, sums);
    }
}

template <int Index, int Tokens>
void dot_narrow(const uint8_t* weights, const int8_t* q, int64_t stride, int64_t count, int64_t interval,
                int32_t (*dots)[kTile]) {
    constexpr ChunkShape shape = chunk_shape(kFormats[Index]);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int t = 0; t < Tokens; ++t) std::memset(dots[t], 0, sizeof(dots[t]));
    for (int64_t start = 0; start < count; start += interval) {
        const int64_t end = least(count, start + interval);
        __m256i sums[Tokens][2];
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
        for (int64_t c = start; c < end; ++c)
            add_chunk<Index, Tokens>(weights + c * shape.vectors * kVector, q + c * 4 * shape.quads, stride,
                                     sums);
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                auto* to = reinterpret_cast<__m256i*>(dots[t] + 8 * half);
                _mm256_store_si256(
                    to, _mm256_add_epi32(_mm256_load_si256(to), _mm256_madd_epi16(sums[t][half], ones)));
            }
    }
}

// int8 weights with sums that int16 has no room for: signs move to the activations, every pair is widened at
// once.
template <int Tokens>
void dot_wide(const uint8_t* weights, const int8_t* q, int64_t stride, int64_t count,
              int32_t (*dots)[kTile]) {
    const __m256i ones = _mm256_set1_epi16(1), top = _mm256_set1_epi8(static_cast<char>(0x80));
    __m256i sums[Tokens][2];
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
    for (int64_t c = 0; c < count; ++c) {
        const __m256i first = _mm256_xor_si256(load(weights + c * kVector), top);
        const __m256i second = _mm256_xor_si256(load(weights + c * kVector + 32), top);
        const __m256i first_size = _mm256_abs_epi8(first), second_size = _mm256_abs_epi8(second);
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) {
            const __m256i four = broadcast(q + t * stride + 4 * c);
            const __m256i a = _mm256_maddubs_epi16(first_size, _mm256_sign_epi8(four, first));
            const __m256i b = _mm256_maddubs_epi16(second_size, _mm256_sign_epi8(four, second));
            sums[t][0] = _mm256_add_epi32(sums[t][0], _mm256_madd_epi16(a, ones));
            sums[t][1] = _mm256_add_epi32(sums[t][1], _mm256_madd_epi16(b, ones));
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
            _mm256_store_si256(reinterpret_cast<__m256i*>(dots[t] + 8 * half), sums[t][half]);
}

class Micro {
  public:
    static constexpr int kTokens = 4;

    explicit Micro(int bits) : largest_((1 << (bits - 1)) - 1) {}

    // int8 weights keep their sign where the sums have no room for codes.
    int32_t offset(const FormatSpec& format) const { return wide(format) ? 0 : format.offset; }

    template <int Index>
    void dot(const uint8_t* weights, const int8_t* q, int64_t stride, int tokens, int64_t count,
             int32_t (*dots)[kTile]) const {
        for (; tokens >= 4; tokens -= 4, q += 4 * stride, dots += 4)
            part<Index, 4>(weights, q, stride, count, dots);
        for (; tokens >= 2; tokens -= 2, q += 2 * stride, dots += 2)
            part<Index, 2>(weights, q, stride, count, dots);
        if (tokens) part<Index, 1>(weights, q, stride, count, dots);
    }

  private:
    static int levels(const FormatSpec& format) { return format.planes == 3 ? 8 : format.radix; }

    // The largest sum of a pair of products in one int16.
    int pair(const FormatSpec& format) const { return 2 * (levels(format) - 1) * largest_; }
    bool wide(const FormatSpec& format) const { return pair(format) > 32767; }

    template <int Index, int Tokens>
    void part(const uint8_t* weights, const int8_t* q, int64_t stride, int64_t count,
              int32_t (*dots)[kTile]) const {
        constexpr FormatSpec format = kFormats[Index];
        if constexpr (Index == 3)
            if (wide(format)) return dot_wide<Tokens>(weights, q, stride, count, dots);
        const int64_t interval = 32767 / pair(format) / chunk_shape(format).quads;
        dot_narrow<Index, Tokens>(weights, q, stride, count, interval, dots);
    }

    int largest_;
};

}  // namespace

std::unique_ptr<CpuKernel> make_quant_gemm_avx2(const FormatSpec& format, const Attributes& attributes,
                                                bool low_rank) {
    return make_tiled<Micro>(format, attributes, low_rank);
}

}  // namespace d2d
