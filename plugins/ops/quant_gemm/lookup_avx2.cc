// Ternary GEMM by vpshufb. Example: M 256, K 1152, N 4608, one core of a 3.2 GHz Zen 3, operands in the caches.
//   operations 1.36 G multiply-adds. A table holds the 9 sums of 2 weights; a look-up and a sum of bytes, 2
//     instructions, do 32 outputs of 2 k's = 64 of them. vpshufb has two pipes, vpaddb four, and the four are
//     all there are: 2 look-ups a cycle and widening, 3 instructions a stretch, gives
//       max |q| 7 (A4)  stretch 9: 20 instructions for 576: 115 a cycle = 369 G/s = 3.7 ms         <- the bound
//       max |q| 3 (A3)  stretch 21: 122 a cycle = 391 G/s = 3.5 ms; 1 (A2) stretch 63: 126 a cycle = 403 G/s
//     vpmaddubsw and vpaddw do 32 by two instructions: 64 a cycle = 205 G/s (cpu_avx2.cc)
//   bytes w 1.3 MB + q 0.3 MB + y 4.7 MB: below 0.6 ms at 20 GB/s
// Reached, from the first-level cache: 276, 305, 320 G/s for A4, A3, A2; the whole GEMM: 205, 216, 228, where the
// products reach 135. Of its time 75 % are look-ups, 12 % scales and y, 5 % the order of the weights, 5 % tables.
// Rule, as measured: up to max |q| 21 (stretch 3: 155 against 137 G/s; at 25, stretch 2, 131), for any number of
// tokens (one: 56 against 24 G/s). Tried: 2 by 2 vectors with the words in registers, slower at every width. Not for int3: one weight has 8 sums, so 2 instructions would do 32 as well.
#include <immintrin.h>

#include "lookups.h"

namespace d2d {
namespace {

inline __m128i load_16(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline void store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

inline __m256i both_lanes(const void* from) { return _mm256_broadcastsi128_si256(load_16(from)); }

inline __m256i halves(const uint8_t* low, const uint8_t* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load_16(low)), load_16(high), 1);
}

// In assembly, since gcc 12 moves all look-ups before the first sum, runs out of registers and loses a fifth.
[[gnu::always_inline]] inline void look_up(__m256i& sum, __m256i table, __m256i index) {
    __m256i found, total = sum;
    asm volatile(
        "vpshufb %3, %2, %1\n\t"
        "vpaddb %1, %0, %0"
        : "+x"(total), "=&x"(found)
        : "x"(table), "x"(index));
    sum = total;
}

// The bytes of one token and 4 vectors of outputs; members, since gcc keeps elements of an array in memory.
struct Bytes {
    __m256i a, b, c, d;
};

[[gnu::always_inline]] inline Bytes first_of(const uint8_t* table, const Bytes& index) {
    const __m256i sums = both_lanes(table);
    return {_mm256_shuffle_epi8(sums, index.a), _mm256_shuffle_epi8(sums, index.b),
            _mm256_shuffle_epi8(sums, index.c), _mm256_shuffle_epi8(sums, index.d)};
}

[[gnu::always_inline]] inline void add_to(Bytes& bytes, const uint8_t* table, const Bytes& index) {
    const __m256i sums = both_lanes(table);
    look_up(bytes.a, sums, index.a);
    look_up(bytes.b, sums, index.b);
    look_up(bytes.c, sums, index.c);
    look_up(bytes.d, sums, index.d);
}

[[gnu::always_inline]] inline Bytes load_index(const uint8_t* from) {
    return {load(from), load(from + 32), load(from + 64), load(from + 96)};
}

[[gnu::always_inline]] inline void widen(__m256i bytes, uint16_t* sums) {
    store(sums, _mm256_add_epi16(load(sums), bytes));
    store(sums + 16, _mm256_add_epi16(load(sums + 16), _mm256_srli_epi16(bytes, 8)));
}

[[gnu::always_inline]] inline void widen(const Bytes& bytes, uint16_t* sums) {
    widen(bytes.a, sums);
    widen(bytes.b, sums + 32);
    widen(bytes.c, sums + 64);
    widen(bytes.d, sums + 96);
}

// From 4 bytes (k's 4f + 0 .. 3) an output to all outputs of a k: [k][4 outputs].
inline __m256i by_code(__m256i four_outputs) {
    return _mm256_shuffle_epi8(
        four_outputs, _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1,
                                       5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
}

struct Tables {
    static constexpr FormatSpec kFormat = kTernary;
    static constexpr int64_t kLanes = 32, kStepVectors = 4, kStepTokens = 2, kCodes = 2, kTableBytes = 16;
    static constexpr int64_t kLeastVectors = kStepVectors, kGroupTokens = 64, kMostTokens = 64;
    static constexpr int64_t kBlockChunks = 16, kMostOutputs = 1152;
    static constexpr int kMostLargest = 21;

    // 8 tables a chunk, of k's j and 4 + j (lower half) and 8 + j and 12 + j: entry d + 4 e belongs to codes d, e.
    static void build(const int8_t* q, int64_t count, int64_t shift, uint8_t* to) {
        const __m256i first = _mm256_setr_epi8(-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, 0, 0, 0, 0,  //
                                               -1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, 0, 0, 0, 0);
        const __m256i second = _mm256_setr_epi8(-1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0,  //
                                                -1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0);
        const __m256i half = halves_of(0, 8), zero = _mm256_set1_epi8(static_cast<char>(shift));
        for (int64_t chunk = 0; chunk < count; ++chunk, q += 16) {
            const __m256i codes = both_lanes(q);
            for (int j = 0; j < 4; ++j, to += 32) {
                const __m256i a = _mm256_shuffle_epi8(codes, _mm256_add_epi8(half, _mm256_set1_epi8(j)));
                const __m256i b = _mm256_shuffle_epi8(codes, _mm256_add_epi8(half, _mm256_set1_epi8(4 + j)));
                const __m256i sum = _mm256_add_epi8(_mm256_sign_epi8(a, first), _mm256_sign_epi8(b, second));
                store(to, _mm256_add_epi8(sum, zero));
            }
        }
    }

    // Two bits of a byte are the code of one k: its nibbles are the index of two look-ups.
    static void order(const uint8_t* const* tiles, int, int64_t count, uint8_t* to) {
        for (int64_t chunk = 0; chunk < count; ++chunk)
            for (int vector = 0; vector < kStepVectors; ++vector) {
                const uint8_t* even = tiles[2 * vector] + chunk * kVector;
                const uint8_t* odd = tiles[2 * vector + 1] + chunk * kVector;
                const __m256i even_a = by_code(halves(even, even + 32)),
                              odd_a = by_code(halves(odd, odd + 32));
                const __m256i even_b = by_code(halves(even + 16, even + 48));
                const __m256i odd_b = by_code(halves(odd + 16, odd + 48));
                const __m256i a01 = _mm256_unpacklo_epi8(even_a, odd_a),
                              b01 = _mm256_unpacklo_epi8(even_b, odd_b);
                const __m256i a23 = _mm256_unpackhi_epi8(even_a, odd_a),
                              b23 = _mm256_unpackhi_epi8(even_b, odd_b);
                uint8_t* at = to + chunk * 8 * 128 + vector * 32;
                store_index(_mm256_unpacklo_epi64(a01, b01), at);
                store_index(_mm256_unpackhi_epi64(a01, b01), at + 2 * 128);
                store_index(_mm256_unpacklo_epi64(a23, b23), at + 4 * 128);
                store_index(_mm256_unpackhi_epi64(a23, b23), at + 6 * 128);
            }
    }

    static void add(const uint8_t* tables, int64_t stride, const uint8_t* index, int tokens, int,
                    int64_t lookups, int64_t stretch, bool begins, uint16_t* sums) {
        if (begins) std::memset(sums, 0, static_cast<size_t>(tokens * kStepVectors * kLanes) * sizeof(*sums));
        if (tokens == 2) return add_two(tables, stride, index, lookups, stretch, sums);
        for (int64_t i = 0; i < lookups; i += stretch) {
            Bytes bytes = first_of(tables + 16 * i, load_index(index + 128 * i));
            for (int64_t j = i + 1; j < least(lookups, i + stretch); ++j)
                add_to(bytes, tables + 16 * j, load_index(index + 128 * j));
            widen(bytes, sums);
        }
    }

  private:
    static __m256i halves_of(char low, char high) {
        return _mm256_set_m128i(_mm_set1_epi8(high), _mm_set1_epi8(low));
    }

    static void store_index(__m256i bytes, uint8_t* to) {
        const __m256i low = _mm256_set1_epi8(15);
        store(to, _mm256_and_si256(bytes, low));
        store(to + 128, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
    }

    // 8 sums, 4 index vectors, a table and what it gives: 14 of 16 registers. A function of its own: inlined,
    // it shares them with its surroundings, and index vectors are loaded twice.
    [[gnu::noinline]] static void add_two(const uint8_t* tables, int64_t stride, const uint8_t* index,
                                          int64_t lookups, int64_t stretch, uint16_t* sums) {
        for (int64_t i = 0; i < lookups; i += stretch) {
            Bytes at = load_index(index + 128 * i);
            Bytes one = first_of(tables + 16 * i, at), two = first_of(tables + stride + 16 * i, at);
            for (int64_t j = i + 1; j < least(lookups, i + stretch); ++j) {
                at = load_index(index + 128 * j);
                add_to(one, tables + 16 * j, at);
                add_to(two, tables + stride + 16 * j, at);
            }
            widen(one, sums);
            widen(two, sums + 128);
        }
    }
};

// Beside vpdpbusd, 32 multiply-adds by one instruction: 576 by 20 at max |q| 7 are fewer, 256 by 11 at 15 are not enough
// fewer to pay for tables.
struct TablesBesideVnni : Tables {
    static constexpr int kMostLargest = 7;
};

}  // namespace

std::unique_ptr<CpuKernel> make_lookup_avx2(const FormatSpec& format, std::unique_ptr<CpuKernel> rest,
                                            GemmTerms terms) {
    if (format.radix != 3) return rest;
    if (avxvnni_runs_here())
        return std::unique_ptr<CpuKernel>(new LookupGemm<TablesBesideVnni>(std::move(rest), terms));
    return std::unique_ptr<CpuKernel>(new LookupGemm<Tables>(std::move(rest), terms));
}

}  // namespace d2d
