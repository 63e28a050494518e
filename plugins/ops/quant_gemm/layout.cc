// Writing and reading the kernels' layouts one weight at a time.
#include "layout.h"

#include <cstring>

#include "fragments.h"

namespace d2d {
namespace {

// Where the bits of one weight lie: byte of its tile, and shift and width; a second place for the high bit of
// int3.
struct Field {
    int64_t byte;
    int shift;
    int mask;
};

Field low_field(const FormatSpec& format, int64_t n, int64_t k) {
    const ChunkShape shape = chunk_shape(format);
    const int64_t chunk = k / (4 * shape.quads), place = n % kTile * 4 + k % 4;
    const int quad = static_cast<int>(k / 4 % shape.quads);
    const int64_t start = chunk * shape.vectors * kVector;
    if (format.planes == 3) return {start + quad / 4 * kVector + place, 2 * (quad % 4), 3};
    const int bits = 8 / shape.quads;
    return {start + place, bits * quad, (1 << bits) - 1};
}

Field high_field(const FormatSpec& format, int64_t n, int64_t k) {
    const ChunkShape shape = chunk_shape(format);
    const int64_t chunk = k / (4 * shape.quads), place = n % kTile * 4 + k % 4;
    return {(chunk * shape.vectors + 2) * kVector + place, static_cast<int>(k / 4 % shape.quads), 1};
}

void to_cpu_order(const FormatSpec& format, int64_t n, int64_t k, const int32_t* words, int32_t* out) {
    const int64_t tile = tile_bytes(format, k);
    auto* bytes = reinterpret_cast<uint8_t*>(out);
    for (int64_t row = 0; row < n; ++row) {
        uint8_t* start = bytes + row / kTile * tile;
        for (int64_t column = 0; column < k; ++column) {
            const int code = interchange_code(format, words + row * format.words(k), column);
            const Field low = low_field(format, row, column);
            start[low.byte] |= static_cast<uint8_t>((code & low.mask) << low.shift);
            if (format.planes == 3) {
                const Field high = high_field(format, row, column);
                start[high.byte] |= static_cast<uint8_t>((code >> 2) << high.shift);
            }
        }
    }
}

int cpu_order_code(const FormatSpec& format, const int32_t* data, int64_t row_length, int64_t n, int64_t k) {
    const uint8_t* start =
        reinterpret_cast<const uint8_t*>(data) + n / kTile * tile_bytes(format, row_length);
    const Field low = low_field(format, n, k);
    int code = start[low.byte] >> low.shift & low.mask;
    if (format.planes == 3) {
        const Field high = high_field(format, n, k);
        code |= (start[high.byte] >> high.shift & high.mask) << 2;
    }
    return code;
}

void to_fragment_order(const FormatSpec& format, int64_t n, int64_t k, const int32_t* words, int32_t* out) {
    for (int64_t row = 0; row < n; ++row)
        for (int64_t column = 0; column < k; ++column) {
            const auto weight = static_cast<uint32_t>(
                interchange_code(format, words + row * format.words(k), column) - format.offset);
            for (int which = 0; which < kPieces; ++which) {
                const Piece piece = piece_of(format, k, row, column, which);
                if (!piece.count) continue;
                const uint32_t bits = weight >> piece.from & ((1u << piece.count) - 1);
                out[piece.word] =
                    static_cast<int32_t>(static_cast<uint32_t>(out[piece.word]) | bits << piece.shift);
            }
        }
}

}  // namespace

LayoutShape layout_shape(const FormatSpec& format, int64_t layout, int64_t n, int64_t k) {
    if (layout == kInterchange) return {n, format.words(k)};
    if (layout == kCpuOrder) return {(n + kTile - 1) / kTile, tile_bytes(format, k) / 4};
    return {strips(n), strip_units(k) * unit_words(format)};
}

void to_layout(const FormatSpec& format, int64_t layout, int64_t n, int64_t k, const int32_t* words,
               int32_t* out) {
    const LayoutShape shape = layout_shape(format, layout, n, k);
    std::memset(out, 0, static_cast<size_t>(shape.rows * shape.columns) * sizeof(*out));
    (layout == kCpuOrder ? to_cpu_order : to_fragment_order)(format, n, k, words, out);
}

int layout_weight(const FormatSpec& format, int64_t layout, const int32_t* data, int64_t row_length,
                  int64_t n, int64_t k) {
    if (layout == kFragmentOrder) return fragment_weight(format, data, row_length, n, k);
    const int code = layout == kCpuOrder ? cpu_order_code(format, data, row_length, n, k)
                                         : interchange_code(format, data + n * format.words(row_length), k);
    return code - format.offset;
}

}  // namespace d2d
