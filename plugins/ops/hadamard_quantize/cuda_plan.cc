// Which launch computes HadamardQuantize on a GPU, and the ops that prepare the rows before.
//
// The rule: rows in the registers of warps where K is a multiple of 4 and at most 24576 (AdaLn 6144), the block at most
// 512, and every tensor lies at a multiple of 16 bytes (q of 4); else a block of threads a row, through shared memory.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "hadamard_quantize.h"

namespace d2d {
namespace {

constexpr int64_t kThreads = 256;  // of the kernels through shared memory, as in cuda_rows.h
constexpr int64_t kTile = 1024;    // values in shared memory at once, or one Hadamard block if that is longer
constexpr int64_t kLargestBlock =
    8192;  // 32 KiB: with the sums below 48 KiB, what every GPU gives without asking
constexpr int64_t kSpan = 1536, kLargestWarpBlock = 512;  // as in cuda_warp_rows.h
constexpr int64_t kWarp = 32, kWarpsABlock = 4;           // few: registers decide how many warps an SM holds

int64_t warps_of(int64_t k) { return (k + kSpan - 1) / kSpan; }

bool in_registers(int64_t k, int64_t block, int64_t most_warps, const std::vector<const void*>& aligned,
                  const void* q) {
    if (k % 4 || block > kLargestWarpBlock || warps_of(k) > most_warps) return false;
    for (const void* pointer : aligned)
        if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
    return reinterpret_cast<uintptr_t>(q) % 4 == 0;
}

}  // namespace

std::vector<CudaLaunch> plan_rows(const RowKernels& kernels, const Attributes& attributes, const Tensor& x,
                                  const Tensor& qmax, const std::vector<Tensor>& outputs,
                                  const std::vector<uint64_t>& own, std::vector<const void*> vectors) {
    const int64_t m = x.shape.rows(), k = x.shape.last(), block = attributes.integer("block");
    if (block > kLargestBlock)
        throw std::invalid_argument("the CUDA kernel takes Hadamard blocks up to 8192, got " +
                                    std::to_string(block));
    if (m > INT32_MAX)
        throw std::invalid_argument("the CUDA kernel takes up to 2 billion rows, got " + std::to_string(m));
    if (m == 0) return {};
    const int64_t tile = std::min(std::max(kTile / block * block, block), k);
    vectors.push_back(x.data);
    const bool warps = in_registers(k, block, kernels.most_warps, vectors, outputs[0].data);
    const int64_t rows = warps ? std::max<int64_t>(kWarpsABlock / warps_of(k), 1) : 1;
    CudaLaunch launch{};
    launch.function = warps ? kernels.warps : kernels.any;
    launch.grid[0] = static_cast<unsigned>((m + rows - 1) / rows);
    launch.grid[1] = launch.grid[2] = 1;
    launch.block[0] = static_cast<unsigned>(warps ? rows * warps_of(k) * kWarp : kThreads);
    launch.block[1] = launch.block[2] = 1;
    launch.shared_bytes = warps ? 0 : static_cast<unsigned>(tile * sizeof(float));
    launch.words = {word(x),
                    word(qmax),
                    word(outputs[0]),
                    word(outputs[1]),
                    word(k),
                    word(block),
                    word(warps ? m : tile),
                    word(m / qmax.shape.count()),
                    word(attributes.text("clip") == "gaussian"),
                    word(attributes.text("grid") == "mid-rise"),
                    word(static_cast<int64_t>(is_packed(attributes))),
                    word(x.dtype)};
    launch.words.insert(launch.words.end(), own.begin(), own.end());
    return {launch};
}

std::vector<CudaLaunch> plan_hadamard_quantize(const Attributes& attributes,
                                               const std::vector<Tensor>& inputs,
                                               const std::vector<Tensor>& outputs, const CudaMeans&) {
    return plan_rows({"hadamard_quantize", "hadamard_quantize_warps", 16}, attributes, inputs[0], inputs[1],
                     outputs, {}, {});
}

}  // namespace d2d
