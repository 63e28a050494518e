// <Format>Gemm without groups, for more than 16 tokens, on the wgmma of SM 9.0a; opt-in by DIT2DEPLOY_CUDA=wgmma until it was
// proven on a device. H200: 1979 T int8 operations/s, which mma reaches to about 62 % (read, not measured), 4.8 TB/s.
//                                          ternary, operations    bytes w + q + y (float32)
//   DiT-XL/2 fc1, M 512, K 1152, N 4608    5.44 G = 2.7 us        1.3 + 0.6 + 9.4 = 11.4 MB = 2.4 us
//   FLUX fc1, M 4096, K 3072, N 12288      309 G = 156 us         9.4 + 12.6 + 201 = 223 MB = 47 us
// So operations are the bound, and y is most of the bytes. wgmma takes A from registers, B from shared memory alone: packed
// weights are A, unpacked where they are, tokens are B, and the product is y transposed. A warp has a strip of 32 outputs, as
// two products of 16 rows a warp (fragments.h), and 128 tokens; a warpgroup issues m64n128k32, 64 cycles of an SM's tensor
// cores each. For a step of 64 k's of a block of 256 outputs, derived: cycles of an SM, and bytes that it asks of the
// second-level cache in each cycle of its tensor cores:
//             tensor   shared memory: B + copies + weights   issue (below)   bytes a cycle
//   ternary   512      256 +  96 +  32 = 384                 214             24
//   int3      512      256 + 112 +  48 = 416                 250             28
//   int4      512      256 + 128 +  64 = 448                 222             32
//   int8      512      256 + 192 + 128 = 576, the bound      232             48
// What that cache gives is the doubt: 5 TB/s, as in cuda_plan.cc, would be 21 bytes. More outputs for as many tokens would
// ask for less, but 128 sums a lane is what registers hold beside A: one block of 256 threads an SM. Blocks of 128 outputs
// make twice as many where there are few, two an SM, and ask for 40 to 64 bytes a cycle.
//
// The loop: six stages of 64 k's, a barrier a step. A product is under way while its successor's weights are unpacked, and
// over the barrier: at a step all threads have waited for the products of the step before the last, whose stage the next
// copies overwrite. The sums then go through shared memory into the order of mma's fragments, and cuda_tiles.h makes y of
// them, 64 tokens at a time: the same operations in the same order, the same bits.
//
// Promises as in cuda.cu: instructions for a register of 4 weights, which all 128 tokens share, and all others for each
// m64n128k32. No product waits for the one before (the compiler says so where one does).
//   ternary_wgmma 2.1 28.8
//   int3_wgmma 2.5 31.3
//   int4_wgmma 1.9 27.8
//   int8_wgmma 0.4 34.8
#include "cuda_tiles.h"
#include "cuda_wgmma.h"
#include "wgmma.h"

namespace {

// Where the sums of a token and output of the block lie on their way from the products' order to that of `finish_tile`, in
// words: neither the stores, of 8 outputs of 4 tokens, nor the loads, of 8 outputs of 4 tokens, meet a bank twice.
template <class T>
GPU_DEVICE int exchanged(int token, int output) {
    const int spread = token / 2 % 4 ^ token % 2 * 2;
    return token * T::columns + (output ^ 8 * spread);
}

// All sums of the warp, its outputs in halves of 16, from register to shared memory.
template <class T, int N>
GPU_DEVICE void exchange(const gpu::Shared<gpu::Vec16>& memory, int first, int warp, int lane,
                         const gpu::WgmmaSums<N> (&sums)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int r = 0; r < N / 2; ++r) {
            const int token = 8 * (r / 4) + 2 * (lane % 4) + r % 2,
                      output = warp * d2d::kUnitOutputs + 16 * half + 8 * (r / 2 % 2) + lane / 4;
            memory.store_part(first + exchanged<T>(token, output), sums[half].at(r));
        }
}

// Those of a pass's tokens from `token` on, of the outputs from `column` on.
template <class T, int RowTiles>
GPU_DEVICE void sums_of_pass(const gpu::Shared<gpu::Vec16>& memory, int first, int token, int column,
                             Sums<RowTiles>& sums) {
#pragma unroll
    for (int i = 0; i < RowTiles; ++i)
#pragma unroll
        for (int tile = 0; tile < 4; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = first + exchanged<T>(token + 16 * i + 8 * half, column + 8 * tile);
                const auto two = memory.template load_part<gpu::Vec8>(at / 2);
                sums.at[i][tile][2 * half] = (int)two.x;
                sums.at[i][tile][2 * half + 1] = (int)two.y;
            }
}

// K is a multiple of 16, not in groups; q and w are 16-byte aligned.
template <int Index, int Warps>
GPU_DEVICE void wgmma_gemm(const Ports& p) {
    using T = Tiling<Index, d2d::kWgmmaTokens / 16, 1, Warps>;
    using Pass = Tiling<Index, d2d::kWgmmaPass / 16, 1, Warps>;
    using W = Weights<Index>;
    constexpr d2d::FormatSpec format = d2d::kFormats[Index];
    constexpr int stages = d2d::kWgmmaStages;
    static_assert(T::stage == d2d::wgmma_stage(format, Warps) && T::stage % 32 == 0, "atoms of 512 bytes");
    const gpu::Shared<gpu::Vec16> memory = gpu::dynamic_shared<gpu::Vec16>(d2d::wgmma_pieces(format, Warps));
    const int me = (int)gpu::thread(), lane = me % kWarp, warp = me / kWarp;
    const int first_row = (int)gpu::block_x() * T::rows, first_strip = (int)gpu::block_y() * Warps;
    const int steps = (int)d2d::strip_units(p.k);
    Copies<Index, T> copies(p, me, first_row, first_strip, 0, steps);
    gpu::WgmmaSums<T::rows> sums[2];  // of outputs 16 half .. + 15 of the warp's 32
    gpu::WgmmaRows a[2][2];           // of k's 32 part .. + 31, of outputs 16 half .. + 15
    const uint64_t b = gpu::wgmma_descriptor(memory, 0);
#pragma unroll
    for (int i = 0; i < stages - 2; ++i) copies.fetch(memory, i * T::stage, i, steps);
    int step = 0, stage = 0, unused = (stages - 2) * T::stage;
    const auto next = [](int stage) { return stage == (stages - 1) * T::stage ? 0 : stage + T::stage; };
    // A loop that may end before its first step makes the compiler wait for each product.
#pragma unroll 1
    do {
        gpu::copy_async_wait<stages - 3>();
        gpu::fence_async_proxy();
        gpu::sync_block();
        W weights;
        weights.from_shared(memory, stage + T::activations + warp * W::pieces, lane);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    a[part][half].set(r, weights.fragment(2 * half + r % 2, 2 * part + r / 2));
            gpu::wgmma_fence();
#pragma unroll
            for (int half = 0; half < 2; ++half) gpu::wgmma(sums[half], a[part][half], b + stage + 2 * part);
            gpu::wgmma_commit();
            if (part == 0) copies.fetch(memory, unused, step + stages - 2, steps);
            gpu::wgmma_wait<1>();
        }
        stage = next(stage);
        unused = next(unused);
    } while (++step < steps);
    gpu::wgmma_wait<0>();
    gpu::sync_block();
    constexpr int first = 4 * d2d::wgmma_branch(Warps);
    exchange<T>(memory, first, warp, lane, sums);
    gpu::sync_block();
    const int first_column = first_strip * d2d::kUnitOutputs,
              column = warp * d2d::kUnitOutputs + 2 * (lane % 4);
#pragma unroll 1
    for (int token = 0; token < T::rows; token += Pass::rows) {
        Sums<d2d::kWgmmaPass / 16> part;
        Values<d2d::kWgmmaPass / 16> value = {};
        sums_of_pass<T>(memory, first, token + lane / 4, column, part);
        finish_group<Index, Codes::bytes>(p, first_column + column, 0, part, value);
        finish_tile<Pass>(p, memory, first_row + token, first_column, lane / 4, column, value);
    }
}

}  // namespace

#define QUANT_GEMM_WGMMA(name, index)                                                   \
    GPU_KERNEL_OF(256, 1, name##_128x256_wgmma, PORTS) { wgmma_gemm<index, 8>(GIVEN); } \
    GPU_KERNEL_OF(128, 2, name##_128x128_wgmma, PORTS) { wgmma_gemm<index, 4>(GIVEN); }

QUANT_GEMM_WGMMA(ternary_gemm, 0)
QUANT_GEMM_WGMMA(int3_gemm, 1)
QUANT_GEMM_WGMMA(int4_gemm, 2)
QUANT_GEMM_WGMMA(int8_gemm, 3)
