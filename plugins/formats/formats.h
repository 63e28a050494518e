// Weight formats as numbers, as dit2deploy/formats.py has them, and how the interchange words are read.
#pragma once

#include "integers.h"
#if !defined(__CUDACC_RTC__)
#include <cstring>
#endif

namespace d2d {

// w = (sum over planes and digits) - offset; a row is planes * ceil(K / digits) int32 words, word = chunk *
// planes + plane; digits_a_byte digits of `radix` lie in each byte of a word; with several planes, plane p
// holds bit p of the code.
struct FormatSpec {
    const char* name;
    int radix;
    int digits_a_byte;
    int planes;
    int offset;

    constexpr int digits() const { return 4 * digits_a_byte; }
    constexpr int64_t words(int64_t k) const { return planes * ((k + digits() - 1) / digits()); }
};

constexpr FormatSpec kTernary{"ternary", 3, 5, 1, 1};
constexpr FormatSpec kInt3{"int3", 2, 8, 3, 4};
constexpr FormatSpec kInt4{"int4", 16, 2, 1, 8};
constexpr FormatSpec kInt8{"int8", 256, 1, 1, 128};
constexpr FormatSpec kFormats[] = {kTernary, kInt3, kInt4, kInt8};

#if !defined(__CUDACC_RTC__)
inline const FormatSpec* find_format(const char* name) {
    for (const FormatSpec& format : kFormats)
        if (!std::strcmp(format.name, name)) return &format;
    return nullptr;
}
#endif

// Code 0 .. levels - 1 of weight k of a row of interchange words.
constexpr int interchange_code(const FormatSpec& format, const int32_t* row, int64_t k) {
    const int64_t chunk = k / format.digits();
    const int digit = static_cast<int>(k % format.digits());
    const int shift = 8 * (digit / format.digits_a_byte);
    int divisor = 1;
    for (int i = digit % format.digits_a_byte; i > 0; --i) divisor *= format.radix;
    int code = 0;
    for (int plane = 0; plane < format.planes; ++plane) {
        const uint32_t byte = (static_cast<uint32_t>(row[chunk * format.planes + plane]) >> shift) & 255u;
        code |= static_cast<int>(byte / divisor % format.radix) << plane;
    }
    return code;
}

}  // namespace d2d
