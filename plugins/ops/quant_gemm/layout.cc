// Writing and reading layout 1 one code at a time.
#include "layout.h"

#include <cstring>

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

}  // namespace

LayoutShape layout_shape(const FormatSpec& format, int64_t n, int64_t k) {
    return {(n + kTile - 1) / kTile, tile_bytes(format, k) / 4};
}

void to_layout(const FormatSpec& format, int64_t n, int64_t k, const int32_t* words, int32_t* out) {
    const int64_t tile = tile_bytes(format, k);
    auto* bytes = reinterpret_cast<uint8_t*>(out);
    std::memset(bytes, 0, static_cast<size_t>((n + kTile - 1) / kTile * tile));
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

int layout_code(const FormatSpec& format, const int32_t* data, int64_t row_length, int64_t n, int64_t k) {
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

}  // namespace d2d
