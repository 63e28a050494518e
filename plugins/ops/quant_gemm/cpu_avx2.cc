// The GEMMs for AVX2. Example: M 256, K 1152, N 4608, one core of a 3.2 GHz Zen 3, operands in the caches.
//   operations 1.36 G multiply-adds, two multiplier pipes                                            <- the bound
//     ternary .. int4: 32 by vpmaddubsw and vpaddw; 12 of each were measured to take 7.5 cycles: 166 G/s = 8.2 ms
//     int8 by 8 bits: 16 by vpmaddwd and vpaddd: 83 G/s = 16.3 ms
//   bytes w 1.3 MB (ternary) .. 5.3 MB (int8) + q 0.3 MB + y 4.7 MB: below 0.6 ms at 20 GB/s; a residual is read as y is
//     written (fc2, N 1152: 1.2 MB more), where Mul and Add of their own would read and write y twice
// vpmaddubsw multiplies unsigned codes by signed activations and adds pairs in int16: exact as long as the
// sums fit, which the largest code of the call decides: |sum of n quads| <= 2 n (levels - 1) max |q| < 2^15.
// They add up in int16 over many quads before they are widened, where a usual int8 kernel widens each (3
// instructions for 32 multiply-adds, and pairs that saturate). int8 by 8-bit activations has no room for a
// pair: there both sides are int16. int8 by 4-bit ones has room for 9: 1.7 times as fast as by 8-bit ones.
// Ternary by narrow activations is looked up instead: lookup_avx2.cc.
#include "avx2_sums.h"
#include "tiles.h"

namespace d2d {
namespace {

// One token, 16 outputs: a and b += products of the 4 bytes at q. In assembly, since gcc 12 moves the loads
// and products of all tokens before the first sum, runs out of registers and halves the speed.
struct AddCodes {
    [[gnu::always_inline]] void operator()(const int8_t* q, __m256i first, __m256i second, __m256i& a,
                                           __m256i& b) const {
        __m256i four, product, sum_a = a, sum_b = b;
        asm volatile(
            "vpbroadcastd %4, %2\n\t"
            "vpmaddubsw %2, %5, %3\n\t"
            "vpmaddubsw %2, %6, %2\n\t"
            "vpaddw %3, %0, %0\n\t"
            "vpaddw %2, %1, %1"
            : "+x"(sum_a), "+x"(sum_b), "=&x"(four), "=&x"(product)
            : "m"(*reinterpret_cast<const int8_t (*)[4]>(q)), "x"(first), "x"(second));
        a = sum_a;
        b = sum_b;
    }
};

struct AddWords {
    [[gnu::always_inline]] void operator()(const int8_t* q, __m256i first, __m256i second, __m256i& a,
                                           __m256i& b) const {
        __m256i two, product, sum_a = a, sum_b = b;
        asm volatile(
            "vpbroadcastd %4, %2\n\t"
            "vpmaddwd %2, %5, %3\n\t"
            "vpmaddwd %2, %6, %2\n\t"
            "vpaddd %3, %0, %0\n\t"
            "vpaddd %2, %1, %1"
            : "+x"(sum_a), "+x"(sum_b), "=&x"(two), "=&x"(product)
            : "m"(*reinterpret_cast<const int8_t (*)[4]>(q)), "x"(first), "x"(second));
        a = sum_a;
        b = sum_b;
    }
};

class Micro {
  public:
    static constexpr int kTokens = kMostTokens, kTiles = 1;
    static constexpr bool kAsksForLargest = true;

    Micro(const FormatSpec& format, int largest) {
        const int levels = format.planes == 3 ? 8 : format.radix;
        interval_ = 32767 / (2 * (levels - 1) * (largest ? largest : 1));
    }

    // int8 weights beside codes above 31: pairs that must be widened each take longer than int16 on both sides.
    bool wide() const { return interval_ < 2; }
    bool centred() const { return wide(); }

    void add(const int8_t* q, int64_t stride, const uint8_t* weights, int tokens, int64_t quads,
             int32_t* dots) const {
        with_tokens(tokens,
                    [&](auto count) { part<decltype(count)::value>(q, stride, weights, quads, dots); });
    }

  private:
    template <int Tokens>
    void part(const int8_t* q, int64_t stride, const uint8_t* weights, int64_t quads, int32_t* dots) const {
        if (wide())
            return add_stretch<Tokens>(q, stride, weights, 2 * quads, dots, AddWords{},
                                       [](__m256i v) { return v; });
        const __m256i ones = _mm256_set1_epi16(1);
        for (int64_t i = 0; i < quads; i += interval_)
            add_stretch<Tokens>(q + 4 * i, stride, weights + kVector * i, least(interval_, quads - i), dots,
                                AddCodes{}, [&](__m256i v) { return _mm256_madd_epi16(v, ones); });
    }

    int64_t interval_;  // quads whose products add up in int16
};

}  // namespace

std::unique_ptr<CpuKernel> make_quant_gemm_avx2(const FormatSpec& format, const Attributes& attributes,
                                                GemmTerms terms) {
#if defined(D2D_AVXVNNI)
    if (avxvnni_runs_here())
        return make_lookup_avx2(format, make_quant_gemm_avxvnni(format, attributes, terms), terms);
#endif
    return make_lookup_avx2(format, make_tiled<Micro>(format, attributes, terms), terms);
}

}  // namespace d2d
