// Which launch computes a GEMM on a GPU.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "quant_gemm.h"

namespace d2d {
namespace {

constexpr int64_t kWarpsABlock = 4, kTokens = 8, kWarp = 32;  // as in cuda.cu
constexpr int64_t kMostBlocksY = 65535;

const char* function_of(const FormatSpec& format) {
    constexpr const char* names[] = {"ternary_gemm", "int3_gemm", "int4_gemm", "int8_gemm"};
    for (size_t i = 0; i < std::size(kFormats); ++i)
        if (!std::strcmp(kFormats[i].name, format.name)) return names[i];
    throw std::invalid_argument("no CUDA kernel for this format");
}

}  // namespace

std::vector<CudaLaunch> plan_quant_gemm(const FormatSpec& format, bool low_rank, const Attributes& attributes,
                                        const std::vector<Tensor>& inputs,
                                        const std::vector<Tensor>& outputs) {
    if (attributes.integer("layout") != 0)
        throw std::invalid_argument("the CUDA kernels read layout 0, the interchange words");
    const GemmProblem p(inputs.data(), outputs.data(), low_rank);
    if (p.m == 0) return {};
    CudaLaunch launch{};
    launch.function = function_of(format);
    launch.grid[0] = static_cast<unsigned>((p.n + kWarpsABlock - 1) / kWarpsABlock);
    launch.grid[1] = static_cast<unsigned>(std::min((p.m + kTokens - 1) / kTokens, kMostBlocksY));
    launch.grid[2] = 1;
    launch.block[0] = static_cast<unsigned>(kWarpsABlock * kWarp);
    launch.block[1] = launch.block[2] = 1;
    launch.words = {word(p.q), word(p.s), word(p.w), word(p.ws), word(p.bias),   word(p.t),   word(p.up),
                    word(p.y), word(p.m), word(p.n), word(p.k),  word(p.groups), word(p.rank)};
    return {launch};
}

}  // namespace d2d
