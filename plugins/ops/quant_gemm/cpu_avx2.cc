// The GEMMs for AVX2. Example: M 256, K 1152, N 4608, one core of a 3.2 GHz Zen 3, operands in the caches.
//   operations 1.36 G multiply-adds, two multiplier pipes                                            <- the bound
//     ternary .. int4: 32 by vpmaddubsw and vpaddw; 12 of each were measured to take 7.5 cycles: 166 G/s = 8.2 ms
//     int8 by 8 bits: 16 by vpmaddwd and vpaddd: 83 G/s = 16.3 ms
//   bytes w 1.3 MB (ternary) .. 5.3 MB (int8) + q 0.3 MB + y 4.7 MB: below 0.6 ms at 20 GB/s
// vpmaddubsw multiplies unsigned codes by signed activations and adds pairs in int16: exact as long as the
// sums fit, which the largest code of the call decides: |sum of n quads| <= 2 n (levels - 1) max |q| < 2^15.
// They add up in int16 over many quads before they are widened, where a usual int8 kernel widens each (3
// instructions for 32 multiply-adds, and pairs that saturate). int8 by 8-bit activations has no room for a
// pair: there both sides are int16. int8 by 4-bit ones has room for 9: 1.7 times as fast as by 8-bit ones.
// Ternary by narrow activations is looked up instead: lookup_avx2.cc.
#include <immintrin.h>

#include "tiles.h"

namespace d2d {
namespace {

inline __m256i load(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

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

// The sums of some tokens, as a recursion: gcc keeps members in registers, but elements of an array in
// memory.
template <int Tokens>
struct Sums {
    __m256i a = _mm256_setzero_si256(), b = _mm256_setzero_si256();
    Sums<Tokens - 1> others;

    template <class Add>
    [[gnu::always_inline]] void add(const int8_t* q, int64_t stride, __m256i first, __m256i second,
                                    const Add& one) {
        one(q, first, second, a, b);
        others.add(q + stride, stride, first, second, one);
    }

    template <class Widen>
    [[gnu::always_inline]] void add_to(int32_t* dots, const Widen& widen) const {
        auto* to = reinterpret_cast<__m256i*>(dots);
        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), widen(a)));
        _mm256_storeu_si256(to + 1, _mm256_add_epi32(_mm256_loadu_si256(to + 1), widen(b)));
        others.add_to(dots + kTile, widen);
    }
};

template <>
struct Sums<0> {
    template <class Add>
    void add(const int8_t*, int64_t, __m256i, __m256i, const Add&) {}
    template <class Widen>
    void add_to(int32_t*, const Widen&) const {}
};

// `steps` times 64 bytes of weights and 4 bytes of each token: a quad of codes, or half a quad of int16.
template <int Tokens, class Add, class Widen>
[[gnu::always_inline]] inline void add_stretch(const int8_t* q, int64_t stride, const uint8_t* weights,
                                               int64_t steps, int32_t* dots, const Add& one,
                                               const Widen& widen) {
    Sums<Tokens> sums;
    do {
        sums.add(q, stride, load(weights), load(weights + 32), one);
        weights += kVector;
        q += 4;
    } while (--steps);
    sums.add_to(dots, widen);
}

class Micro {
  public:
    // 12 sums, 2 weights, an activation and a product fill the 16 registers.
    static constexpr int kTokens = 6;
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
        switch (tokens) {
            case 6: return part<6>(q, stride, weights, quads, dots);
            case 5: return part<5>(q, stride, weights, quads, dots);
            case 4: return part<4>(q, stride, weights, quads, dots);
            case 3: return part<3>(q, stride, weights, quads, dots);
            case 2: return part<2>(q, stride, weights, quads, dots);
            default: return part<1>(q, stride, weights, quads, dots);
        }
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
                                                bool low_rank) {
    return make_lookup_avx2(format, make_tiled<Micro>(format, attributes, low_rank), low_rank);
}

}  // namespace d2d
