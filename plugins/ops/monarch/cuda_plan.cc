// Which launch computes MonarchAdd on a GPU.
#include <stdexcept>
#include <string>

#include "monarch.h"

namespace d2d {
namespace {

constexpr int64_t kThreads = 256, kTokens = 4;  // as in cuda.cu
constexpr int64_t kMostValues = 3072;  // of z: with kTokens 48 KiB, what every GPU gives without asking

}  // namespace

std::vector<CudaLaunch> plan_monarch_add(const Attributes&, const std::vector<Tensor>& inputs,
                                         const std::vector<Tensor>& outputs, const CudaMeans&) {
    const MonarchProblem p(inputs.data(), outputs.data());
    if (p.values() > kMostValues)
        throw std::invalid_argument("the CUDA kernel takes grids of up to 3072 blocks times rank, got " +
                                    std::to_string(p.values()));
    if (p.m == 0) return {};
    CudaLaunch launch{};
    launch.function = "monarch_add";
    launch.grid[0] = static_cast<unsigned>((p.m + kTokens - 1) / kTokens);
    launch.grid[1] = launch.grid[2] = 1;
    launch.block[0] = static_cast<unsigned>(kThreads);
    launch.block[1] = launch.block[2] = 1;
    launch.shared_bytes = static_cast<unsigned>(kTokens * p.values() * sizeof(float));
    launch.words = {word(p.plain),     word(p.x),          word(p.down), word(p.up),
                    word(p.y),         word(p.m),          word(p.n),    word(p.k),
                    word(p.blocks_in), word(p.blocks_out), word(p.rank), word(outputs[0].dtype)};
    return {launch};
}

}  // namespace d2d
