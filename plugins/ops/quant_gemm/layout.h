// The layouts of packed weights: 0 the interchange words (formats.h), 2 the GPU kernels' (fragments.h), and
// layout 1: weights in the order in which the CPU kernels read them, at packed width, the same for every
// instruction set.
//
// A tile is 16 outputs (N is padded to whole tiles) and runs along K in chunks. A quad is 4 neighbouring k's;
// byte p of a 64-byte vector belongs to output p / 4 of the tile and to k 4 * quad + p % 4, as byte dot
// products want it. A chunk holds
//   ternary  4 quads in 1 vector:   bits 2f, 2f + 1 of each byte are the code of quad f
//   int3     8 quads in 3 vectors:  the low two bits of quads 0-3 and of 4-7 as in ternary; bit f of the third is high
//   int4     2 quads in 1 vector:   bits 4f .. 4f + 3
//   int8     1 quad  in 1 vector:   the code itself
// with codes 0 .. levels - 1 (w = code - offset). K is padded to whole chunks with codes 0; activations there
// are zeros.
#pragma once

#include <cstdint>

#include "formats.h"

namespace d2d {

constexpr int64_t kTile = 16;
constexpr int64_t kVector = 64;

struct ChunkShape {
    int quads;
    int vectors;
};

constexpr ChunkShape chunk_shape(const FormatSpec& format) {
    if (format.planes == 3) return {8, 3};
    if (format.radix == 3) return {4, 1};
    return format.radix == 16 ? ChunkShape{2, 1} : ChunkShape{1, 1};
}

constexpr int64_t chunks(const FormatSpec& format, int64_t k) {
    const int64_t size = 4 * chunk_shape(format).quads;
    return (k + size - 1) / size;
}

// Bytes of one tile of 16 outputs.
constexpr int64_t tile_bytes(const FormatSpec& format, int64_t k) {
    return chunks(format, k) * chunk_shape(format).vectors * kVector;
}

// Which order the words of a GEMM have: the attribute `layout`.
constexpr int64_t kInterchange = 0;
constexpr int64_t kCpuOrder = 1;
constexpr int64_t kFragmentOrder = 2;  // fragments.h
constexpr int64_t kLayouts = 3;

// Of the int32 tensor: a row an output, a tile or a strip of units.
struct LayoutShape {
    int64_t rows;
    int64_t columns;
};
LayoutShape layout_shape(const FormatSpec& format, int64_t layout, int64_t n, int64_t k);

// words: interchange, [n][format.words(k)]. out: [rows][columns] of a kernel's layout.
void to_layout(const FormatSpec& format, int64_t layout, int64_t n, int64_t k, const int32_t* words,
               int32_t* out);

// Weight (n, k), its offset subtracted: how portable code reads any layout.
int layout_weight(const FormatSpec& format, int64_t layout, const int32_t* data, int64_t row_length,
                  int64_t n, int64_t k);

}  // namespace d2d
