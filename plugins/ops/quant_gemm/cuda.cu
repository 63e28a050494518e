// <Format>Gemm, plain, LowRank, Residual and LowRankResidual. Example: DiT-XL/2 fc1, M 512, K 1152, N 4608, ternary, RTX 4090.
//   operations 2 M N K = 5.44 G / 660 T/s (int8 tensor cores)      = 8.2 us
//   bytes w 1.33 + q 0.59 + y 9.44 = 11.4 MB / 1.0 TB/s            = 11 us with float32 outputs
//   bytes w 1.33 + q 0.59 + y 4.72 = 6.6 MB / 1.0 TB/s             = 6.6 us with float16 or bfloat16 ones
// With a residual, fc2, K 4608, N 1152: w 1.33 + q 2.36 + y 2.36 + residual 2.36 = 8.4 MB = 8.4 us, with halves 6.0 MB; Mul
// and Add of their own would move y four times more.
// M 1 (modulation, N 6912): bytes w 2.0 MB / 1.0 TB/s = 2.0 us against 16 us of float16 weights.
// Activations and weights of at most 4 bits, on int4 tensor cores (7.5, 8.x): fc1 above in 5.44 G / 1321 T/s = 4.1 us. A step
// of 64 k's of a warp of 64 x 32 takes half as many mma. Where codes are packed (kPacked in op.h), two a byte, they are half
// the bytes everywhere (q 0.29 MB in fc1) and fragments as they lie; cycles of a scheduler, by the counts below and rates
// that were read, not timed:
//                         tensor, 7.5 8.6 8.9   tensor, 8.0 8.7   shared memory   instructions: ternary int3 int4
//   bytes, 128 x 128      512                   256               184                           118     127  115
//   packed, 128 x 128     256                   128               104                            74      99   63
// So packed codes leave the tensor cores as the bound with every format and on all of them: 2 times. (Packed into nibbles
// in registers, from a byte each in memory, they took 138 to 174 instructions and 184 cycles: bound by those on 8.0 and
// 8.7.) Warps of 32 x 32 have half the mma, 72 cycles of shared memory instead of 120, and 64, 91 and 55 instructions: on 8.0
// and 8.7 1.8 times, int3 1.4 times. From 9.0 on, where there are no int4 tensor cores, packed codes are masked into bytes,
// three instructions for two registers, and multiplied as those: slower by that, faster by their bytes. Up to 16 tokens, where
// the bytes of w are the bound, int8 tensor cores multiply them on every GPU.
// Three kernels a format; cuda_plan.cc chooses, by a rule that is written there:
//   tiles (cuda_tiles.h)            int8 tensor cores over block tiles, layout 2; in slices of K where tiles are few
//   few tokens (cuda_few_tokens.h)  the same for M <= 16, bound by the bytes of w, layout 2
//   any (below)                     every K, group size, address and layout: a warp an output, far from the bounds
// The tiles have twins for packed codes; the other two read both.
// Promises of the main loop of 128 x 128 tiles, counted in machine code by tools/cuda_statistics.py --check on every SM
// it lists: instructions for a register of 4 unpacked weights (shared by 4 mma), and all that are not mma, for each mma.
// Nothing spills. int8 unpacks nothing: what counts there is logic of addresses, 6 or 7 instructions for 16 registers.
//   ternary 2.2 3.0
//   int3 2.7 3.3
//   int4 2.0 2.9
//   int8 0.5 2.9
// Of packed codes, on int4 tensor cores for a register of 8 weights and for each mma.m16n8k64:
//   ternary_packed 2.2 4.1
//   int3_packed 5.1 5.4
//   int4_packed 0.7 3.4
// and from 9.0 on as those of bytes, with what makes bytes of codes:
//   ternary_packed_on_int8 5.1 4.2
//   int3_packed_on_int8 5.6 4.4
//   int4_packed_on_int8 4.9 4.0
#include "cuda_few_tokens.h"
#include "cuda_tiles.h"

namespace {

constexpr int kWarpsABlock = 4;
constexpr int kTokens = 8;
constexpr int kFinishThreads = 256;

GPU_DEVICE int code_of(const Ports& p, int64_t token, int64_t k) {
    if (!p.packed) return p.q[token * p.k + k];
    const int both = p.q[token * p.k / 2 + k / 64 * 32 + k % 32];
    return k % 64 < 32 ? (int8_t)(uint8_t)(both << 4) >> 4 : both >> 4;
}

template <int Index>
GPU_DEVICE void any_gemm(const Ports& p, bool fragment_order) {
    constexpr d2d::FormatSpec format = d2d::kFormats[Index];
    const int64_t lane = gpu::thread() % kWarp,
                  output = gpu::block_x() * kWarpsABlock + gpu::thread() / kWarp;
    if (output >= p.n) return;  // a whole warp
    const int32_t* row = p.w + output * format.words(p.k);
    const int64_t size = p.k / p.groups;
    for (int64_t first = gpu::block_y() * kTokens; first < p.m; first += gpu::blocks_y() * kTokens) {
        const int64_t count = p.m - first < kTokens ? p.m - first : kTokens;
        float total[kTokens] = {};
        for (int64_t group = 0; group < p.groups; ++group) {
            int sums[kTokens] = {};
            for (int64_t i = group * size + lane; i < (group + 1) * size; i += kWarp) {
                const int weight = fragment_order ? d2d::fragment_weight(format, p.w, p.k, output, i)
                                                  : d2d::interchange_code(format, row, i) - format.offset;
                for (int token = 0; token < count; ++token)
                    sums[token] += weight * code_of(p, first + token, i);
            }
            for (int token = 0; token < count; ++token) {
                for (int mask = kWarp / 2; mask; mask /= 2)
                    sums[token] += gpu::shuffle_xor(sums[token], mask);
                total[token] += (float)sums[token] * p.ws[output * p.groups + group];
            }
        }
        if (lane >= count) continue;
        float mine =
            0;  // lane i finishes token i; an index that is not constant would move the array to local memory
#pragma unroll
        for (int token = 0; token < kTokens; ++token) mine = token == lane ? total[token] : mine;
        float value = mine * p.s[first + lane] + p.bias[output];
        for (int64_t r = 0; r < p.rank; ++r)
            value += p.t[(first + lane) * p.rank + r] * p.up[output * p.rank + r];
        store_element(p.y, (first + lane) * p.n + output, p.dtype,
                      stream_of(p, first + lane).joined(output, value));
    }
}

// An element of y of its integer sum, which may lie in its place, as the tiles' epilogue makes it; w << (8 - bits) was
// summed, spare = 8 - bits.
GPU_DEVICE void finish_sum(const Ports& p, int spare, const int32_t* sums) {
    const int64_t output = gpu::block_x() * kFinishThreads + gpu::thread(), token = gpu::block_y();
    if (output >= p.n) return;
    const int64_t at = token * p.n + output;
    const float scale = 1.0f / (float)(1 << spare) * gpu::load(p.ws + output);
    float value = (float)gpu::load(sums + at) * scale;
    value = value * gpu::load(p.s + token) + gpu::load(p.bias + output);
    for (int64_t r = 0; r < p.rank; ++r)
        value = gpu::multiply_add(gpu::load(p.t + token * p.rank + r), gpu::load(p.up + output * p.rank + r),
                                  value);
    store_element(p.y, at, p.dtype, stream_of(p, token).joined(output, value));
}

}  // namespace

// An SM 7.5 has shared memory for one block of 128 x 128, of packed codes for two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define LARGE_BLOCKS 1
#else
#define LARGE_BLOCKS 2
#endif

#define QUANT_GEMM(name, index)                                                                              \
    GPU_KERNEL(name##_any, PORTS, int64_t fragment_order) { any_gemm<index>(GIVEN, fragment_order != 0); }   \
    GPU_KERNEL_OF(256, LARGE_BLOCKS, name##_128x128, PORTS) { tile_gemm<index, 4, 2, 4, Of::whole>(GIVEN); } \
    GPU_KERNEL_OF(128, 4, name##_64x64, PORTS) { tile_gemm<index, 2, 2, 2, Of::whole>(GIVEN); }              \
    GPU_KERNEL_OF(128, 3, name##_64x64_groups, PORTS) { tile_gemm<index, 2, 2, 2, Of::groups>(GIVEN); }      \
    GPU_KERNEL_OF(128, 4, name##_64x64_slice, PORTS) { tile_gemm<index, 2, 2, 2, Of::slice>(GIVEN); }        \
    GPU_KERNEL_OF(256, 2, name##_16, PORTS) { few_tokens_gemm<index, false>(GIVEN); }                        \
    GPU_KERNEL_OF(256, 2, name##_16_groups, PORTS) { few_tokens_gemm<index, true>(GIVEN); }

#define QUANT_GEMM_PACKED(name, index)                                                                     \
    GPU_KERNEL_OF(256, 2, name##_128x128_packed, PORTS) { packed_gemm<index, 4, 2, 4, Of::whole>(GIVEN); } \
    GPU_KERNEL_OF(128, 4, name##_64x64_packed, PORTS) { packed_gemm<index, 2, 2, 2, Of::whole>(GIVEN); }   \
    GPU_KERNEL_OF(128, 3, name##_64x64_groups_packed, PORTS) {                                             \
        packed_gemm<index, 2, 2, 2, Of::groups>(GIVEN);                                                    \
    }                                                                                                      \
    GPU_KERNEL_OF(128, 4, name##_64x64_slice_packed, PORTS) { packed_gemm<index, 2, 2, 2, Of::slice>(GIVEN); }

QUANT_GEMM(ternary_gemm, 0)
QUANT_GEMM(int3_gemm, 1)
QUANT_GEMM(int4_gemm, 2)
QUANT_GEMM(int8_gemm, 3)

QUANT_GEMM_PACKED(ternary_gemm, 0)
QUANT_GEMM_PACKED(int3_gemm, 1)
QUANT_GEMM_PACKED(int4_gemm, 2)

GPU_KERNEL_OF(kFinishThreads, 4, gemm_zero, int32_t* sums, int64_t count) {
    const int64_t i = gpu::block_x() * kFinishThreads + gpu::thread();
    if (i < count) gpu::store(sums + i, 0);
}

GPU_KERNEL_OF(kFinishThreads, 4, gemm_finish, PORTS, int64_t spare, const int32_t* sums) {
    finish_sum(GIVEN, (int)spare, sums);
}
