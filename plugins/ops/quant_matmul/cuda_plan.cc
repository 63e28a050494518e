// Which launch computes QuantMatMul on a GPU.
#include <algorithm>

#include "quant_matmul.h"

namespace d2d {
namespace {

constexpr int64_t kWarpsABlock = 4, kRows = 8, kWarp = 32;  // as in cuda.cu
constexpr int64_t kMostBlocksY = 65535;

}  // namespace

std::vector<CudaLaunch> plan_quant_matmul(const Attributes&, const std::vector<Tensor>& inputs,
                                          const std::vector<Tensor>& outputs, const CudaMeans&) {
    const MatMulProblem p(inputs.data(), outputs.data());
    const int64_t blocks = p.heads * ((p.m + kRows - 1) / kRows);
    if (blocks == 0 || p.n == 0) return {};
    CudaLaunch launch{};
    launch.function = "quant_matmul";
    launch.grid[0] = static_cast<unsigned>((p.n + kWarpsABlock - 1) / kWarpsABlock);
    launch.grid[1] = static_cast<unsigned>(std::min(blocks, kMostBlocksY));
    launch.grid[2] = 1;
    launch.block[0] = static_cast<unsigned>(kWarpsABlock * kWarp);
    launch.block[1] = launch.block[2] = 1;
    launch.words = {word(p.a),     word(p.sa), word(p.b), word(p.sb), word(p.y),
                    word(p.heads), word(p.m),  word(p.n), word(p.k),  word(outputs[0].dtype)};
    return {launch};
}

}  // namespace d2d
