// Which launch computes HadamardQuantize on a GPU.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "hadamard_quantize.h"

namespace d2d {
namespace {

constexpr unsigned kThreads = 256;  // as in cuda.cu
constexpr int64_t kTile = 1024;  // values in shared memory at once, or one Hadamard block if that is longer
constexpr int64_t kLargestBlock =
    8192;  // 32 KiB: with the sums below 48 KiB, what every GPU gives without asking

}  // namespace

std::vector<CudaLaunch> plan_hadamard_quantize(const Attributes& attributes,
                                               const std::vector<Tensor>& inputs,
                                               const std::vector<Tensor>& outputs) {
    const int64_t m = inputs[0].shape.rows(), k = inputs[0].shape.last(), block = attributes.integer("block");
    if (block > kLargestBlock)
        throw std::invalid_argument("the CUDA kernel takes Hadamard blocks up to 8192, got " +
                                    std::to_string(block));
    if (m == 0) return {};
    const int64_t tile = std::max(kTile / block * block, block);
    CudaLaunch launch{};
    launch.function = "hadamard_quantize";
    launch.grid[0] = static_cast<unsigned>(m);
    launch.grid[1] = launch.grid[2] = 1;
    launch.block[0] = kThreads;
    launch.block[1] = launch.block[2] = 1;
    launch.shared_bytes = static_cast<unsigned>(std::min(tile, k) * sizeof(float));
    launch.words = {word(inputs[0]),
                    word(inputs[1]),
                    word(outputs[0]),
                    word(outputs[1]),
                    word(k),
                    word(block),
                    word(std::min(tile, k)),
                    word(m / inputs[1].shape.count()),
                    word(attributes.text("clip") == "gaussian"),
                    word(attributes.text("grid") == "mid-rise")};
    return {launch};
}

}  // namespace d2d
