// Shapes of the GEMMs' blocks on wgmma, for the kernels and for what plans their launches; free of any standard header.
#pragma once

#include "fragments.h"

namespace d2d {

constexpr int kWgmmaTokens = 128;  // of a block: the columns of a product
constexpr int kWgmmaStages = 6;    // of 64 k's
constexpr int kWgmmaPass = 64;     // tokens whose y is made at once

// Shared memory of a block in pieces of 16 bytes: a stage holds codes of the tokens, and a unit of weights for each warp.
constexpr int wgmma_stage(const FormatSpec& format, int warps) {
    return kWgmmaTokens * kUnitDepth / 16 + warps * (int)unit_words(format) / 4;
}
// Afterwards: ranks of a pass's tokens and of the outputs, four at a time, then all sums.
constexpr int wgmma_branch(int warps) { return kWgmmaPass + kUnitOutputs * warps; }
constexpr int wgmma_pieces(const FormatSpec& format, int warps) {
    const int ring = kWgmmaStages * wgmma_stage(format, warps);
    const int sums = wgmma_branch(warps) + kWgmmaTokens * kUnitOutputs * warps / 4;
    return ring > sums ? ring : sums;
}

}  // namespace d2d
