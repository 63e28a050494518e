// Ternary and int3 GEMMs by tables of AVX-512 VBMI. Example: M 256, K 1152, N 4608 on one core of a 3.6 GHz Zen 4.
//   operations 1.36 G multiply-adds. Of four half-width pipes a 512-bit instruction takes two, a look-up two of the
//     two that permute; widening is 3 instructions a stretch:
//       ternary by vpermi2b: 81 sums of 4 weights, 64 outputs of 4 k's = 256 a look-up
//         A4, stretch 4: 4 look-ups, 3 sums, 3 to widen = 5 cycles for 1024: 205 a cycle = 737 G/s = 1.8 ms
//       int3 by vpermb: 64 sums of 2 weights, 128 a look-up                                         <- the bounds
//         A3, stretch 5: 6 cycles for 640: 107 a cycle = 384 G/s = 3.5 ms
//         A4, stretch 2: 3 cycles for 256: 85 a cycle = 307 G/s; A5, stretch 1, is no faster than vpdpbusd
//       vpdpbusd: 64 a cycle = 230 G/s = 5.9 ms (cpu_avx512.cc)
//   bytes w 1.3 MB (ternary), 2.0 MB (int3) + q 0.3 MB + y 4.7 MB: below 0.6 ms at 20 GB/s
// Measured on a Zen 4: 3.7 ms of this example with ternary A4, of it look-ups and sums 2.4 (alone, from the first level, 2.25),
// the rest tables, index vectors (whose words come from the third level) and y. Two tokens by four vectors: a load serves two
// to four look-ups, as an instruction set that loads one such vector a cycle needs. Blocks of 192 k's: tables of two tokens
// and index vectors of a step fill 24 of 32 KiB; blocks of 64, 96, 128, 288 and more, and 4, 6 or 8 tokens, took 1.05 to 1.2
// times as long, tables of all tokens in the second level 1.35 times.
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

// 81 sums of 4 ternary weights. What it gives lies where a copy of the index lay: the instruction overwrites either. Written
// out, since gcc 12 overwrites the table as often and then moves all sums about.
struct TernaryTable {
    static constexpr int64_t kBytes = 128;
    __m512i lower, upper;

    explicit TernaryTable(const uint8_t* from)
        : lower(in_register(load(from))), upper(in_register(load(from + 64))) {}

    __m512i at(__m512i index) const {
#if defined(D2D_SIMDE)
        return _mm512_permutex2var_epi8(lower, index, upper);
#else
        asm("vpermi2b %2, %1, %0" : "+v"(index) : "v"(lower), "v"(upper));
        return index;
#endif
    }
};

// 64 sums of 2 int3 weights.
struct Int3Table {
    static constexpr int64_t kBytes = 64;
    __m512i all;

    explicit Int3Table(const uint8_t* from) : all(in_register(load(from))) {}

    __m512i at(__m512i index) const { return in_register(_mm512_permutexvar_epi8(index, all)); }
};

constexpr int64_t kStep = 256;  // outputs: four vectors

// Adds `Unit` look-ups to the bytes, or begins them.
template <bool begins, int Unit, class Table, int Tokens, int Vectors>
[[gnu::always_inline]] inline void look_up(const uint8_t* tables, int64_t stride, const uint8_t* index,
                                           __m512i (&bytes)[Tokens][Vectors]) {
#pragma GCC unroll 4
    for (int j = 0; j < Unit; ++j) {
        __m512i at[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) at[v] = in_register(load(index + j * kStep + v * 64));
#pragma GCC unroll 2
        for (int t = 0; t < Tokens; ++t) {
            const Table table(tables + t * stride + j * Table::kBytes);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) {
                const __m512i found = table.at(at[v]);
                bytes[t][v] = begins && j == 0 ? found : in_register(_mm512_add_epi8(bytes[t][v], found));
            }
        }
    }
}

// 16 vectors of words, 8 of bytes, 4 index vectors, a table of 2 and a copy of an index vector: 31 of 32 registers. A
// function of its own, so that they are not shared with its surroundings. `stretch` and `lookups` are whole units.
template <int Tokens, int Vectors, int Unit, class Table>
[[gnu::noinline]] void add_tokens(const uint8_t* tables, int64_t stride, const uint8_t* index,
                                  int64_t lookups, int64_t stretch, bool begins, uint16_t* sums) {
    __m512i words[Tokens][Vectors], high[Tokens][Vectors], bytes[Tokens][Vectors];
#pragma GCC unroll 2
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            const __m512i* from = reinterpret_cast<const __m512i*>(sums + t * kStep + v * 64);
            words[t][v] = begins ? _mm512_setzero_si512() : load(from);
            high[t][v] = begins ? _mm512_setzero_si512() : load(from + 1);
        }
    for (int64_t first = 0; first < lookups; first += stretch) {
        look_up<true, Unit, Table>(tables + first * Table::kBytes, stride, index + first * kStep, bytes);
        for (int64_t j = first + Unit; j < least(lookups, first + stretch); j += Unit)
            look_up<false, Unit, Table>(tables + j * Table::kBytes, stride, index + j * kStep, bytes);
#pragma GCC unroll 2
        for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) {
                words[t][v] = _mm512_add_epi16(words[t][v], bytes[t][v]);
                high[t][v] = _mm512_add_epi16(high[t][v], _mm512_srli_epi16(bytes[t][v], 8));
            }
    }
#pragma GCC unroll 2
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            store(sums + t * kStep + v * 64, words[t][v]);
            store(sums + t * kStep + v * 64 + 32, high[t][v]);
        }
}

template <int Unit, class Table>
void add_units(const uint8_t* tables, int64_t stride, const uint8_t* index, int tokens, int vectors,
               int64_t lookups, int64_t stretch, bool begins, uint16_t* sums) {
    const auto add = tokens == 2
                         ? (vectors == 4 ? add_tokens<2, 4, Unit, Table> : add_tokens<2, 2, Unit, Table>)
                         : (vectors == 4 ? add_tokens<1, 4, Unit, Table> : add_tokens<1, 2, Unit, Table>);
    add(tables, stride, index, lookups, stretch / Unit * Unit, begins, sums);
}

// What the tables of both formats share.
template <class Table>
struct Steps {
    static constexpr int64_t kLanes = 64, kStepVectors = 4, kStepTokens = 2;
    static constexpr int64_t kLeastVectors = 2, kGroupTokens = 2, kTableBytes = Table::kBytes;
    static constexpr int64_t kMostOutputs = 2304, kMostTokens = 128;

    static void add(const uint8_t* tables, int64_t stride, const uint8_t* index, int tokens, int vectors,
                    int64_t lookups, int64_t stretch, bool begins, uint16_t* sums) {
        const auto units = stretch >= 4   ? add_units<4, Table>
                           : stretch >= 2 ? add_units<2, Table>
                                          : add_units<1, Table>;
        units(tables, stride, index, tokens, vectors, lookups, stretch, begins, sums);
    }
};

// Bytes 4 o + j of the outputs o of 4 tiles, for k's that differ in j, to a vector of 64 outputs a j: even bytes
// are tiles 0 and 1, odd ones 2 and 3. `bytes(tile)` gives a tile's.
template <class F>
void order_tiles(const F& bytes, uint8_t* to) {
    static constexpr Lanes kPlaces = lanes([](int i) { return 64 * (i % 2) + i % 32 / 2 * 4 + i / 32; });
    const __m512i low = _mm512_setr_epi64(0, 1, 2, 3, 8, 9, 10, 11);
    const __m512i high = _mm512_setr_epi64(4, 5, 6, 7, 12, 13, 14, 15);
    const __m512i even_0 = bytes(0), even_1 = bytes(1), odd_0 = bytes(2), odd_1 = bytes(3);
    for (int j = 0; j < 4; j += 2, to += 2 * kStep) {
        const __m512i places = _mm512_add_epi8(load(kPlaces), all(j));
        const __m512i first = _mm512_permutex2var_epi8(even_0, places, odd_0);
        const __m512i second = _mm512_permutex2var_epi8(even_1, places, odd_1);
        store(to, _mm512_permutex2var_epi64(first, low, second));
        store(to + kStep, _mm512_permutex2var_epi64(first, high, second));
    }
}

// Which sums of pairs make the entries of 4 tables, 64 at a time.
struct EntriesOf {
    Lanes low[8], high[8];

    constexpr EntriesOf() : low{}, high{} {
        for (int i = 0; i < 8; ++i) {
            const int table = 16 * (i / 2), first = 64 * (i % 2);
            low[i] = lanes([=](int lane) { return table + (first + lane) % 9; });
            high[i] = lanes([=](int lane) { return table + (first + lane < 81 ? (first + lane) / 9 : 0); });
        }
    }
};

struct TernaryTables : Steps<TernaryTable> {
    static constexpr FormatSpec kFormat = kTernary;
    static constexpr int64_t kCodes = 4, kBlockChunks = 12;
    static constexpr int kMostLargest = 31;

    // 4 tables a chunk, of k's j, 4 + j, 8 + j, 12 + j: entry d + 3 e + 9 f + 27 g.
    static void build(const int8_t* q, int64_t count, int64_t shift, uint8_t* to) {
        static constexpr EntriesOf kEntries;
        const __m512i half = all(shift / 2);
        for (int64_t chunk = 0; chunk < count; ++chunk, q += 16) {
            const __m512i codes =
                _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
            const __m512i low = sums_of_pairs(codes, 0, half), high = sums_of_pairs(codes, 8, half);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i, to += 64)
                store(to, _mm512_add_epi8(_mm512_permutexvar_epi8(load(kEntries.low[i]), low),
                                          _mm512_permutexvar_epi8(load(kEntries.high[i]), high)));
        }
    }

    static void order(const uint8_t* const* tiles, int vectors, int64_t count, uint8_t* to) {
        for (int64_t chunk = 0; chunk < count; ++chunk, to += 4 * kStep)
            for (int vector = 0; vector < vectors; ++vector)
                order_tiles(
                    [&](int tile) { return to_radix_3(load(tiles[4 * vector + tile] + chunk * kVector)); },
                    to + vector * kLanes);
    }
};

struct Int3Tables : Steps<Int3Table> {
    static constexpr FormatSpec kFormat = kInt3;
    static constexpr int64_t kCodes = 2, kBlockChunks = 4;
    static constexpr int kMostLargest = 7;

    // 16 tables a chunk, of k's 8 i + j and 8 i + 4 + j. Bits 0, 1 and 4 of an entry's number are the code of the
    // first, bits 2, 3 and 5 that of the second.
    static void build(const int8_t* q, int64_t count, int64_t shift, uint8_t* to) {
        static constexpr Lanes kEight = lanes([](int i) { return i / 8; });
        static constexpr Lanes kFirst = lanes([](int i) { return i % 4 + i / 16 % 2 * 4; });
        static constexpr Lanes kSecond = lanes([](int i) { return 32 + i / 4 % 4 + i / 32 * 4; });
        for (int64_t eight = 0; eight < 4 * count; ++eight, q += 8) {
            int64_t codes;
            std::memcpy(&codes, q, sizeof(codes));
            const __m512i one = _mm512_shuffle_epi8(_mm512_set1_epi64(codes), load(kEight));
            const __m512i two = _mm512_add_epi8(one, one), four = _mm512_add_epi8(two, two);
            // Byte 8 k + code: (code - 4) q + half the shift.
            __m512i products = _mm512_sub_epi8(all(shift / 2), four);
            products = _mm512_mask_add_epi8(products, 0xaaaaaaaaaaaaaaaau, products, one);
            products = _mm512_mask_add_epi8(products, 0xccccccccccccccccu, products, two);
            products = _mm512_mask_add_epi8(products, 0xf0f0f0f0f0f0f0f0u, products, four);
            for (int j = 0; j < 4; ++j, to += 64) {
                const __m512i first = _mm512_add_epi8(load(kFirst), all(8 * j));
                const __m512i second = _mm512_add_epi8(load(kSecond), all(8 * j));
                store(to, _mm512_add_epi8(_mm512_permutexvar_epi8(first, products),
                                          _mm512_permutexvar_epi8(second, products)));
            }
        }
    }

    static void order(const uint8_t* const* tiles, int vectors, int64_t count, uint8_t* to) {
        for (int64_t chunk = 0; chunk < count; ++chunk)
            for (int pair = 0; pair < 4; ++pair, to += 4 * kStep)
                for (int vector = 0; vector < vectors; ++vector)
                    order_tiles(
                        [&](int tile) {
                            return index_of(tiles[4 * vector + tile] + 3 * chunk * kVector, pair);
                        },
                        to + vector * kLanes);
    }

  private:
    // Of quads 2 pair and 2 pair + 1: two low bits of each, then the high one of each.
    static __m512i index_of(const uint8_t* chunk, int pair) {
        const __m512i low = load(chunk + pair / 2 * kVector), high = load(chunk + 2 * kVector);
        const __m512i four = pair % 2 ? _mm512_srli_epi16(low, 4) : low;
        const __m512i two = _mm512_slli_epi16(_mm512_srli_epi16(high, static_cast<unsigned>(2 * pair)), 4);
        return _mm512_or_si512(_mm512_and_si512(four, all(15)), _mm512_and_si512(two, all(48)));
    }
};

}  // namespace

std::unique_ptr<CpuKernel> make_lookup_avx512(const FormatSpec& format, std::unique_ptr<CpuKernel> rest,
                                              GemmTerms terms) {
    if (format.radix == 3)
        return std::unique_ptr<CpuKernel>(new LookupGemm<TernaryTables>(std::move(rest), terms));
    if (format.planes == 3)
        return std::unique_ptr<CpuKernel>(new LookupGemm<Int3Tables>(std::move(rest), terms));
    return rest;
}

}  // namespace d2d
