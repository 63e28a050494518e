// Which launch computes MultiRegionQuantize on a GPU.
#include "multi_region_quantize.h"

namespace d2d {
namespace {

constexpr unsigned kThreads = 128;  // as in cuda.cu

}  // namespace

std::vector<CudaLaunch> plan_multi_region_quantize(const Attributes&, const std::vector<Tensor>& inputs,
                                                   const std::vector<Tensor>& outputs, const CudaMeans&) {
    const int64_t m = inputs[0].shape.rows(), k = inputs[0].shape.last();
    if (m == 0) return {};
    CudaLaunch launch{};
    launch.function = "multi_region_quantize";
    launch.grid[0] = static_cast<unsigned>(m);
    launch.grid[1] = launch.grid[2] = 1;
    launch.block[0] = kThreads;
    launch.block[1] = launch.block[2] = 1;
    launch.words = {word(inputs[0]),      word(inputs[1]),  word(inputs[2]),
                    word(outputs[0]),     word(outputs[1]), word(outputs[2]),
                    word(outputs[3]),     word(k),          word(m / inputs[1].shape.count()),
                    word(inputs[0].dtype)};
    return {launch};
}

}  // namespace d2d
