// float16 in C++, for the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace gpu {

inline float of_float16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                            : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                           : std::ldexp(static_cast<float>(fraction), -24);
    return bits >> 15 ? -magnitude : magnitude;
}

namespace host {

inline uint32_t float16_of(float value) {
    const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return 0x7fff;
    if (std::fabs(value) >= 65520) return sign | 0x7c00;
    int exponent = -13;  // of zero, too, the steps are the smallest
    if (value != 0) std::frexp(value, &exponent);
    const int unit = std::max(exponent - 11, -24);  // 2^unit: a step of the last place
    const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(std::fabs(value), -unit)));
    return sign | ((static_cast<uint32_t>(unit + 24) << 10) + steps);  // whose 1024 counts as one exponent
}

}  // namespace host

inline uint32_t to_float16(float low, float high) {
    return host::float16_of(low) | host::float16_of(high) << 16;
}

}  // namespace gpu
