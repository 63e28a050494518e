// Which launch computes a GEMM on a GPU.
//
// The rule, first line that holds:
//   any        layout 0; K no multiple of 16; groups of no multiple of 32 (packed codes: 64); K >= 131072 (sums of weights
//              at the top of their bytes would leave int32); q, w, residual or gate not 16-byte aligned; N even and y not
//              aligned to the two elements that are stored at once; N odd and y not float32, so that tiles need no halves
//              one by one
//   16         M <= 16, and K and its groups multiples of 64
//   64x64      groups
//   128x128    where it makes at least 128 blocks, about one for each SM of a large card; weights are then read from
//              shared memory by half as many warps, activations by half as many blocks
//   64x64      what is left; of its tiles there are T < 512, each with S = K / 64 steps
//
// The last is split along K into s = min(256 / T, S / 16) slices where that saves at least 48 steps, S - S / s. Derived,
// not measured: a warp's 16 mma of a step take some 110 cycles, barrier, ldmatrix and unpacking add as many where a block
// has its SM alone, 0.12 us at 1.8 GHz, so 48 steps are 6 us. Two more launches of 2 us, and the sums (at most 128 * 64 *
// 64 int32) moved s + 3 times through the second-level cache at 5 TB/s, up to 1.7 us for s = 4, are less. 256 blocks put
// two on each SM of a large card, and 16 steps a slice keep the ring of stages busy. Example: DiT-XL/2 fc2, M 256, N
// 1152, K 4608: T 72, S 72, s 3. The partial sums lie in y itself where y is float32, else in a workspace; without one K is
// not split.
//
// Packed codes have tiles of their own, which use the int4 tensor cores of GPUs that have them; 16 and any read both.
//
// Where DIT2DEPLOY_CUDA asks for wgmma, what comes to the last two lines runs on it (cuda_wgmma.cu), K never split, but for
// packed codes, as wgmma reads them from shared memory, a byte each:
//   128x256    where it makes at least 128 blocks
//   128x128    what is left
//
// A tactic takes the place of what comes after the groups, so that a runtime can time what was derived here: one of these
// kernels for every shape that it can compute (K in slices where s > 1), and the rule for all others. Those on wgmma are
// there where DIT2DEPLOY_CUDA asks for them, and are refused elsewhere: a kernel that was not asked for never runs.
#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "cuda_choice.h"
#include "cuda_wgmma.h"
#include "fragments.h"
#include "layout.h"
#include "quant_gemm.h"

namespace d2d {
namespace {

constexpr int64_t kWarp = 32, kWarpsABlock = 4, kTokens = 8;  // of the kernel `any`, as in cuda.cu
constexpr int64_t kMostBlocksY = 65535;
constexpr int64_t kLeastBlocks = 128, kFewTokens = 16, kMostDepth = 131072;
constexpr int64_t kSliceBlocks = 256, kSliceSteps = 16, kSavedSteps = 48;
constexpr int64_t kFinishThreads = 256;  // as in cuda.cu

constexpr size_t kY = 7;  // of the kernels' parameters

enum Variant { any, few, few_groups, small, small_groups, slice, large, wgmma_narrow, wgmma_wide, kVariants };

// In the order of their numbers, which engines hold: never changed, added to at the end.
constexpr struct {
    const char* name;
    std::optional<Variant> variant;
} kTactics[] = {{"rule", std::nullopt},          {"64x64", small},
                {"64x64_slice", slice},          {"128x128", large},
                {"128x128_wgmma", wgmma_narrow}, {"128x256_wgmma", wgmma_wide}};

#define TILED(format, suffix)                                                            \
    format "_64x64" suffix, format "_64x64_groups" suffix, format "_64x64_slice" suffix, \
        format "_128x128" suffix
#define ALL(format)                                                                           \
    {format "_any",           format "_16",           format "_16_groups", TILED(format, ""), \
     format "_128x128_wgmma", format "_128x256_wgmma"}
#define PACKED(format) \
    {format "_any", format "_16", format "_16_groups", TILED(format, "_packed"), nullptr, nullptr}

constexpr const char* kFunctions[][kVariants] = {ALL("ternary_gemm"), ALL("int3_gemm"), ALL("int4_gemm"),
                                                 ALL("int8_gemm")};
constexpr const char* kPackedFunctions[][kVariants] = {PACKED("ternary_gemm"), PACKED("int3_gemm"),
                                                       PACKED("int4_gemm")};

int64_t blocks(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

bool aligned(const void* pointer, size_t bytes = 16) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

bool is_on_wgmma(Variant variant) { return variant == wgmma_narrow || variant == wgmma_wide; }

int64_t tiles_of(const GemmProblem& p) { return blocks(p.m, 64) * blocks(p.n, 64); }

// Of K, for 64 x 64 tiles; below 2: it cannot be split.
int64_t slices_of(const GemmProblem& p) {
    return std::min(kSliceBlocks / tiles_of(p), blocks(p.k, 64) / kSliceSteps);
}

bool split_pays(const GemmProblem& p) {
    const int64_t steps = blocks(p.k, 64), slices = slices_of(p);
    return slices > 1 && steps - steps / slices >= kSavedSteps;
}

// Nothing where it is left to rule or tactic.
std::optional<Variant> without_choice(const GemmProblem& p, DType dtype, int64_t layout) {
    const int64_t size = p.k / p.groups;
    if (layout != kFragmentOrder || p.k % 16 || (p.groups > 1 && size % (p.packed ? 64 : 32)) ||
        p.k >= kMostDepth || !aligned(p.q) || !aligned(p.w) || !aligned(p.residual) || !aligned(p.gate) ||
        (p.n % 2 == 0 ? !aligned(p.y, 2 * size_of(dtype)) : dtype != DType::f32))
        return any;
    if (p.m <= kFewTokens && size % 64 == 0) return p.groups == 1 ? few : few_groups;
    if (p.groups > 1) return small_groups;
    return std::nullopt;
}

bool uses_wgmma(const GemmProblem& p) { return !p.packed && wgmma_is_asked_for(); }

Variant by_rule(const GemmProblem& p, bool has_room) {
    if (uses_wgmma(p))
        return blocks(p.m, kWgmmaTokens) * blocks(p.n, 256) >= kLeastBlocks ? wgmma_wide : wgmma_narrow;
    if (blocks(p.m, 128) * blocks(p.n, 128) >= kLeastBlocks) return large;
    return has_room && split_pays(p) ? slice : small;
}

// `has_room`: for the sums of slices.
Variant variant_of(const GemmProblem& p, DType dtype, int64_t layout, int tactic, bool has_room) {
    if (const auto variant = without_choice(p, dtype, layout)) return *variant;
    const auto asked = tactic ? kTactics[tactic - 1].variant : std::nullopt;
    if (!asked) return by_rule(p, has_room);
    if (is_on_wgmma(*asked) && p.packed)
        throw std::invalid_argument("tactic " + std::to_string(tactic) +
                                    " is a kernel on wgmma, which takes no packed codes");
    if (is_on_wgmma(*asked) && !wgmma_is_asked_for())
        throw std::invalid_argument("tactic " + std::to_string(tactic) + " is a kernel on wgmma: set " +
                                    "DIT2DEPLOY_CUDA=wgmma, as where it was chosen");
    return asked != slice || (has_room && slices_of(p) > 1) ? *asked : by_rule(p, has_room);
}

struct Tile {
    int64_t rows, columns, threads;
};

Tile tile_of(Variant variant) {
    switch (variant) {
        case any: return {kTokens, kWarpsABlock, kWarpsABlock * kWarp};
        case few:
        case few_groups: return {kFewTokens, 32, 256};
        case large: return {128, 128, 256};
        case wgmma_narrow: return {kWgmmaTokens, 128, 128};
        case wgmma_wide: return {kWgmmaTokens, 256, 256};
        default: return {64, 64, 128};
    }
}

// Integers of 0, one for each element of y.
CudaLaunch zeroed(const GemmProblem& p, const void* sums) {
    const int64_t count = p.m * p.n;
    return {"gemm_zero",
            {static_cast<unsigned>(blocks(count, kFinishThreads)), 1, 1},
            {static_cast<unsigned>(kFinishThreads), 1, 1},
            0,
            {word(sums), word(count)}};
}

// y of its sums, which count weights 2^spare times.
CudaLaunch finished(const GemmProblem& p, const void* sums, int64_t spare, std::vector<uint64_t> words) {
    words.insert(words.end(), {word(spare), word(sums)});
    return {"gemm_finish",
            {static_cast<unsigned>(blocks(p.n, kFinishThreads)), static_cast<unsigned>(p.m), 1},
            {static_cast<unsigned>(kFinishThreads), 1, 1},
            0,
            words};
}

// `whole`, of 64x64 tiles, in slices of K.
std::vector<CudaLaunch> in_slices(const FormatSpec& format, const GemmProblem& p, void* sums,
                                  const CudaLaunch& whole) {
    CudaLaunch launch = whole;
    launch.grid[2] = static_cast<unsigned>(slices_of(p));
    launch.words[kY] = word(sums);
    return {zeroed(p, sums), launch, finished(p, sums, 8 - weight_bits(format), whole.words)};
}

}  // namespace

std::vector<const char*> quant_gemm_tactics() {
    std::vector<const char*> names;
    for (const auto& tactic : kTactics) names.push_back(tactic.name);
    return names;
}

bool quant_gemm_takes_tactic(GemmTerms terms, const Attributes& attributes, const std::vector<Tensor>& inputs,
                             const std::vector<Tensor>& outputs, int tactic) {
    const GemmProblem p(inputs.data(), outputs.data(), terms, is_packed(attributes));
    const auto variant = kTactics[tactic - 1].variant;
    if (p.m == 0 || without_choice(p, outputs[0].dtype, attributes.integer("layout"))) return false;
    if (variant && is_on_wgmma(*variant)) return uses_wgmma(p);
    return variant != slice || slices_of(p) > 1;
}

// T is at most 128 where K is split, which bounds M.
size_t quant_gemm_workspace(GemmTerms terms, const Attributes& attributes, const std::vector<Tensor>& inputs,
                            const std::vector<Tensor>& outputs) {
    const GemmProblem p(inputs.data(), outputs.data(), terms, is_packed(attributes));
    const DType dtype = outputs[0].dtype;
    if (dtype == DType::f32 || p.m == 0 || without_choice(p, dtype, attributes.integer("layout"))) return 0;
    if (blocks(p.k, 64) < 2 * kSliceSteps) return 0;
    const int64_t most_rows = 64 * (kSliceBlocks / 2 / blocks(p.n, 64));
    return sizeof(int32_t) * static_cast<size_t>(p.n * std::min(p.m, most_rows));
}

std::vector<CudaLaunch> plan_quant_gemm(const FormatSpec& format, GemmTerms terms,
                                        const Attributes& attributes, const std::vector<Tensor>& inputs,
                                        const std::vector<Tensor>& outputs, const CudaMeans& means) {
    const int64_t layout = attributes.integer("layout");
    if (layout == kCpuOrder)
        throw std::invalid_argument(
            "the CUDA kernels read layouts 0 (interchange) and 2 (theirs), not layout 1, the CPU kernels'");
    const GemmProblem p(inputs.data(), outputs.data(), terms, is_packed(attributes));
    if (p.m == 0) return {};
    const size_t index = static_cast<size_t>(
        std::find_if(std::begin(kFormats), std::end(kFormats),
                     [&](const FormatSpec& f) { return !std::strcmp(f.name, format.name); }) -
        std::begin(kFormats));
    const DType dtype = outputs[0].dtype;
    void* const sums = dtype == DType::f32 ? p.y : means.workspace;  // of the slices of K
    const bool has_room = dtype == DType::f32 || means.workspace;
    const Variant variant = variant_of(p, dtype, layout, means.tactic, has_room);
    const Tile tile = tile_of(variant);
    const int64_t rows = blocks(p.m, tile.rows), columns = blocks(p.n, tile.columns);
    const bool is_tiled = variant != any && variant != few && variant != few_groups;
    if ((is_tiled && columns > kMostBlocksY) || p.m > INT32_MAX - 128)
        throw std::invalid_argument(
            "the CUDA kernels take up to 4 million outputs and 2 billion tokens, got " + std::to_string(p.n) +
            " and " + std::to_string(p.m));
    CudaLaunch launch{};
    launch.function = (p.packed ? kPackedFunctions : kFunctions)[index][variant];
    launch.words = {word(p.q),    word(p.s),
                    word(p.w),    word(p.ws),
                    word(p.bias), word(p.t),
                    word(p.up),   word(p.y),
                    word(p.m),    word(p.n),
                    word(p.k),    word(p.groups),
                    word(p.rank), word(p.residual),
                    word(p.gate), word(p.tokens_a_gate),
                    word(dtype),  word(static_cast<int64_t>(p.packed))};
    launch.grid[1] = launch.grid[2] = 1;
    if (variant == any) {
        launch.grid[0] = static_cast<unsigned>(columns);
        launch.grid[1] = static_cast<unsigned>(std::min(rows, kMostBlocksY));
        launch.words.push_back(word(static_cast<int64_t>(layout == kFragmentOrder)));
    } else if (variant == few || variant == few_groups) {
        launch.grid[0] = static_cast<unsigned>(columns);
    } else {
        launch.grid[0] = static_cast<unsigned>(rows);
        launch.grid[1] = static_cast<unsigned>(columns);
    }
    launch.block[0] = static_cast<unsigned>(tile.threads);
    launch.block[1] = launch.block[2] = 1;
    launch.on_wgmma = is_on_wgmma(variant);
    if (launch.on_wgmma)
        launch.shared_bytes =
            static_cast<unsigned>(16 * wgmma_pieces(format, static_cast<int>(tile.columns / kUnitOutputs)));
    if (variant == slice) return in_slices(format, p, sums, launch);
    return {launch};
}

}  // namespace d2d
