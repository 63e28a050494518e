// Ternary GEMM by vpermi2b (AVX-512 VBMI). Example: M 256, K 1152, N 4608 on one core of a 3.6 GHz Zen 4.
//   operations 1.36 G multiply-adds. A table holds the 81 sums of 4 weights in 128 bytes; a look-up and a sum of
//     bytes do 64 outputs of 4 k's = 256 of them. With 512-bit work on four half-width pipes (two for the
//     look-up), and widening, 3 instructions a stretch:
//       max |q| 7 (A4)  stretch 4: 14 half-pipe pairs for 1024: 4 look-ups, 3 sums, 3 to widen = 5 cycles:
//                       205 a cycle = 737 G/s = 1.8 ms                                              <- the bound
//     vpdpbusd does 64 a cycle = 230 G/s (cpu_avx512.cc)
//   bytes w 1.3 MB + q 0.3 MB + y 4.7 MB: below 0.6 ms at 20 GB/s
// Proven bit for bit by emulation; NOT timed: no machine with VBMI was at hand. The rule, up to max |q| 31, follows
// the inner loops measured on a Zen 4 for /shared/cpu.md: 640 G/s for A4, 456 for A6 (stretch 1).
#if defined(D2D_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include "lookups.h"

namespace d2d {
namespace {

struct alignas(64) Lanes {
    uint8_t at[64];
};

// Lanes of bytes by formula, at compile time.
template <class F>
constexpr Lanes lanes(F formula) {
    Lanes made{};
    for (int i = 0; i < 64; ++i) made.at[i] = static_cast<uint8_t>(formula(i));
    return made;
}

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }

inline __m512i load(const Lanes& from) { return _mm512_loadu_si512(from.at); }

inline void store(void* to, __m512i value) { _mm512_storeu_si512(to, value); }

inline __m512i all(int64_t value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// Keeps gcc 12 from loading a vector anew for each of its uses.
inline __m512i in_register(__m512i value) {
#if !defined(D2D_SIMDE)
    asm("" : "+v"(value));
#endif
    return value;
}

// The sums of pairs of codes, a pair a lane of 16 bytes: entry d + 3 e belongs to codes d, e.
inline __m512i sums_of_pairs(__m512i codes, int first, __m512i shift) {
    static constexpr Lanes kLane = lanes([](int i) { return i / 16; });
    constexpr __mmask64 kEach = 0x0001000100010001u;  // bit 0 of the mask of every lane
    const __m512i d = _mm512_shuffle_epi8(codes, _mm512_add_epi8(load(kLane), all(first)));
    const __m512i e = _mm512_shuffle_epi8(codes, _mm512_add_epi8(load(kLane), all(first + 4)));
    __m512i sums = _mm512_mask_sub_epi8(shift, 0x049 * kEach, shift, d);
    sums = _mm512_mask_add_epi8(sums, 0x124 * kEach, sums, d);
    sums = _mm512_mask_sub_epi8(sums, 0x007 * kEach, sums, e);
    return _mm512_mask_add_epi8(sums, 0x1c0 * kEach, sums, e);
}

// Four 2-bit digits of each byte to a number of base 3.
inline __m512i to_radix_3(__m512i bytes) {
    static constexpr Lanes kLow = lanes([](int i) { return i % 4 + 3 * (i % 16 / 4); });
    static constexpr Lanes kHigh = lanes([](int i) { return 9 * (i % 4) + 27 * (i % 16 / 4); });
    const __m512i low = _mm512_and_si512(bytes, all(15));
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), all(15));
    return _mm512_add_epi8(_mm512_shuffle_epi8(load(kLow), low), _mm512_shuffle_epi8(load(kHigh), high));
}

struct Tables {
    static constexpr int64_t kLanes = 64, kStepVectors = 2, kStepTokens = 4, kCodes = 4, kTableBytes = 128;
    static constexpr int64_t kBlockChunks = 8, kMostOutputs = 2304;
    static constexpr int kMostLargest = 31;

    // 4 tables a chunk, of k's j, 4 + j, 8 + j, 12 + j: entry d + 3 e + 9 f + 27 g.
    static void build(const int8_t* q, int64_t count, int64_t shift, uint8_t* to) {
        static constexpr Lanes kFirst[] = {lanes([](int i) { return i % 9; }),
                                           lanes([](int i) { return (64 + i) % 9; })};
        static constexpr Lanes kSecond[] = {lanes([](int i) { return i / 9; }),
                                            lanes([](int i) { return i < 17 ? (64 + i) / 9 : 0; })};
        for (int64_t chunk = 0; chunk < count; ++chunk, q += kCodesAChunk) {
            const __m512i codes =
                _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
            const __m512i low = sums_of_pairs(codes, 0, all(shift / 2));
            const __m512i high = sums_of_pairs(codes, 8, all(shift / 2));
            for (int j = 0; j < 4; ++j)
                for (int half = 0; half < 2; ++half, to += 64) {
                    const __m512i first = _mm512_add_epi8(load(kFirst[half]), all(16 * j));
                    const __m512i second = _mm512_add_epi8(load(kSecond[half]), all(16 * j));
                    store(to, _mm512_add_epi8(_mm512_permutexvar_epi8(first, low),
                                              _mm512_permutexvar_epi8(second, high)));
                }
        }
    }

    static void order(const uint8_t* const* tiles, int64_t count, uint8_t* to) {
        for (int64_t chunk = 0; chunk < count; ++chunk, to += 4 * kStep)
            for (int vector = 0; vector < kStepVectors; ++vector) {
                const auto digits = [&](int tile) {
                    return to_radix_3(load(tiles[4 * vector + tile] + chunk * kVector));
                };
                order_halves(digits(0), digits(2), digits(1), digits(3), to + vector * kLanes);
            }
    }

    static void add(const uint8_t* tables, int64_t stride, const uint8_t* index, int tokens, int64_t lookups,
                    int64_t stretch, uint16_t* sums) {
        if (tokens == 4) return add_tokens<4>(tables, stride, index, lookups, stretch, sums);
        for (int t = 0; t < tokens; ++t)
            add_tokens<1>(tables + t * stride, stride, index, lookups, stretch, sums + t * kStep);
    }

  private:
    static constexpr int64_t kStep = kLanes * kStepVectors;

    // Bytes of outputs (4 i + j: k j of output i) to vectors of a k: even bytes from `even`, 32 outputs in two
    // vectors, odd ones from `odd`.
    static void order_halves(__m512i even_0, __m512i odd_0, __m512i even_1, __m512i odd_1, uint8_t* to) {
        static constexpr Lanes kPlaces = lanes([](int i) { return 64 * (i % 2) + i % 32 / 2 * 4 + i / 32; });
        const __m512i low = _mm512_setr_epi64(0, 1, 2, 3, 8, 9, 10, 11);
        const __m512i high = _mm512_setr_epi64(4, 5, 6, 7, 12, 13, 14, 15);
        for (int j = 0; j < 4; j += 2, to += 2 * kStep) {
            const __m512i places = _mm512_add_epi8(load(kPlaces), all(j));
            const __m512i first = _mm512_permutex2var_epi8(even_0, places, odd_0);
            const __m512i second = _mm512_permutex2var_epi8(even_1, places, odd_1);
            store(to, _mm512_permutex2var_epi64(first, low, second));
            store(to + kStep, _mm512_permutex2var_epi64(first, high, second));
        }
    }

    // 16 vectors of words, 8 of bytes, 2 index vectors, a table of 2 and a copy of one: 29 of 32 registers. A
    // function of its own, so that they are not shared with its surroundings.
    template <int Tokens>
    [[gnu::noinline]] static void add_tokens(const uint8_t* tables, int64_t stride, const uint8_t* index,
                                             int64_t lookups, int64_t stretch, uint16_t* sums) {
        constexpr int kSums = 2 * Tokens;  // [token][vector]
        __m512i words[kSums], high[kSums], bytes[kSums];
#pragma GCC unroll 8
        for (int i = 0; i < kSums; ++i) {
            words[i] = load(sums + i * kLanes);
            high[i] = load(sums + i * kLanes + kLanes / 2);
        }
        for (int64_t first = 0; first < lookups; first += stretch) {
#pragma GCC unroll 8
            for (int i = 0; i < kSums; ++i) bytes[i] = _mm512_setzero_si512();
            for (int64_t j = first; j < least(lookups, first + stretch); ++j) {
                const __m512i a = in_register(load(index + j * kStep));
                const __m512i b = in_register(load(index + j * kStep + kLanes));
#pragma GCC unroll 4
                for (int t = 0; t < Tokens; ++t) {
                    const uint8_t* table = tables + t * stride + j * kTableBytes;
                    const __m512i lower = in_register(load(table)), upper = in_register(load(table + 64));
                    bytes[2 * t] = _mm512_add_epi8(bytes[2 * t], _mm512_permutex2var_epi8(lower, a, upper));
                    bytes[2 * t + 1] =
                        _mm512_add_epi8(bytes[2 * t + 1], _mm512_permutex2var_epi8(lower, b, upper));
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < kSums; ++i) {
                words[i] = _mm512_add_epi16(words[i], bytes[i]);
                high[i] = _mm512_add_epi16(high[i], _mm512_srli_epi16(bytes[i], 8));
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kSums; ++i) {
            store(sums + i * kLanes, words[i]);
            store(sums + i * kLanes + kLanes / 2, high[i]);
        }
    }
};

}  // namespace

std::unique_ptr<CpuKernel> make_ternary_lookup_avx512(std::unique_ptr<CpuKernel> rest, bool low_rank) {
    return std::unique_ptr<CpuKernel>(new LookupGemm<Tables>(std::move(rest), low_rank));
}

}  // namespace d2d
