// Layout 2: weights in the order of the tensor cores' fragments, at packed width; free of any standard header.
//
// A unit is 32 outputs (four tiles of 8) and 64 k's; N and K are padded to whole units with weights of 0. Byte e of
// register r (0 .. 3) of a lane (g = lane / 4, t = lane % 4) for a tile is the weight of output 8 tile + g and of
// k 16 r + 4 t + e: registers 0, 1 are B of the first mma.m16n8k32 over the unit, 2, 3 of the second. Two tiles side by
// side are as well A (16 outputs) of the transposed product. A weight lies in two's complement at the top of its byte
// once it is unpacked, that is as w << (8 - bits): one shift and one AND for four weights, and no subtraction.
//
//   format   words a lane and unit    word                       where
//   ternary  4                        tile                       register r: bits 2 r, 2 r + 1 of each byte
//   int3     6                        3 (tile / 2) + 0 .. 2      register R = 4 (tile % 2) + (0, 3, 2, 1)[r]; 0 - 2: bits
//                                                                5 - 7 of word R; 3 - 5: bits 2 - 4 of word R - 3; 6 and
//                                                                7: what is left
//   int4     8                        2 tile + r % 2             bits 4 (r / 2) .. + 3
//   int8     16                       4 tile + r                 the byte
// The words of a unit: [words / V][lane][V], V = 4 (int3: 2), so that a warp's load of V words is one piece of memory.
//
// For int4 tensor cores registers r (low halves of bytes) and r + 2 (high ones) make one of nibbles: B of mma.m16n8k64, the
// order of k's within a product being free. Packed codes of activations (kPacked in op.h) lie in that order: k beside
// k + 32. The places above are those where nibbles come out of the words at the least cost.
#pragma once

#include "formats.h"

namespace d2d {

constexpr int kUnitOutputs = 32;
constexpr int kUnitDepth = 64;
constexpr int kLanes = 32;

constexpr int weight_bits(const FormatSpec& format) {
    if (format.radix == 2) return format.planes;
    return format.radix == 3 ? 2 : format.radix == 16 ? 4 : 8;
}

// Words of a lane in a unit, and how many of them lie side by side.
constexpr int lane_words(const FormatSpec& format) { return 2 * weight_bits(format); }
constexpr int load_words(const FormatSpec& format) { return weight_bits(format) == 3 ? 2 : 4; }
constexpr int64_t unit_words(const FormatSpec& format) { return lane_words(format) * kLanes; }

constexpr int64_t strips(int64_t n) { return (n + kUnitOutputs - 1) / kUnitOutputs; }
constexpr int64_t strip_units(int64_t k) { return (k + kUnitDepth - 1) / kUnitDepth; }

// R of the table above.
constexpr int int3_register(int tile, int reg) { return tile % 2 * 4 + (reg % 2 ? 4 - reg : reg); }
// Words of a lane and tile of the other formats.
constexpr int tile_words(int bits) { return bits / 2; }

// Where bits `from` .. `from + count - 1` of a weight lie: at bit `shift` of a word.
struct Piece {
    int64_t word;
    int shift, from, count;
};

// A weight has one piece; those of int3's registers 6 and 7 have two.
constexpr int kPieces = 2;

constexpr Piece piece_of(const FormatSpec& format, int64_t row_length, int64_t n, int64_t k, int which) {
    const int bits = weight_bits(format), load = load_words(format);
    const int tile = static_cast<int>(n % kUnitOutputs / 8), reg = static_cast<int>(k % kUnitDepth / 16);
    const int lane = static_cast<int>(n % 8 * 4 + k % 16 / 4), byte = static_cast<int>(k % 4);
    Piece piece{0, 0, 0, which == 0 ? bits : 0};
    int64_t word = 0;
    if (bits == 3) {
        const int index = int3_register(tile, reg);
        word = tile / 2 * 3;
        if (index < 6) {
            word += index % 3;
            piece.shift = index < 3 ? 5 : 2;
        } else if (which == 0) {
            word += index == 6 ? 0 : 2;
            piece.from = 1;
            piece.count = 2;
        } else {
            word += 1;
            piece.shift = index - 6;
            piece.count = 1;
        }
    } else {
        const int words = tile_words(bits);
        word = words * tile + reg % words;
        piece.shift = reg / words * bits;
    }
    piece.shift += 8 * byte;
    const int64_t unit = n / kUnitOutputs * strip_units(row_length) + k / kUnitDepth;
    piece.word = unit * unit_words(format) + (word / load * kLanes + lane) * load + word % load;
    return piece;
}

// The weight itself, -offset .. levels - 1 - offset.
constexpr int fragment_weight(const FormatSpec& format, const int32_t* data, int64_t row_length, int64_t n,
                              int64_t k) {
    uint32_t found = 0;
    for (int which = 0; which < kPieces; ++which) {
        const Piece piece = piece_of(format, row_length, n, k, which);
        if (piece.count)
            found |= (static_cast<uint32_t>(data[piece.word]) >> piece.shift & ((1u << piece.count) - 1))
                     << piece.from;
    }
    const int bits = weight_bits(format);
    return static_cast<int>(found) - (static_cast<int>(found >> (bits - 1)) << bits);
}

}  // namespace d2d
