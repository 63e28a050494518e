// The GEMMs for NEON without byte dot products (Cortex-A53 .. A73: Jetson Nano, Raspberry Pi 4). Bounds for M 256,
// K 1152, N 4608 on one core at 1.5 GHz that starts one vector instruction a cycle; no such CPU was at hand to measure:
//   operations 1.36 G multiply-adds, 8 an instruction: 12 G/s = 113 ms                             <- the bound
//     ternary by narrow activations is looked up, 16 an instruction: lookup_neon.cc
//   bytes w 1.3 MB (ternary) .. 5.3 MB (int8) + q 0.3 MB + y 4.7 MB: below 6 ms at 2 GB/s
// smlal adds products of bytes to int16, a lane for each output and k % 4: exact as long as the sums fit, which the
// largest code of the call decides: n (largest weight) max |q| < 2^15. Codes of int8 are made weights, code - 128, since
// they must be signed: 128 * 128 fits once.
#include "neon.h"
#include "tiles.h"

namespace d2d {
namespace {

template <int Tokens, bool Centred>
void add_tokens(const int8_t* q, int64_t stride, const uint8_t* weights, int64_t quads, int64_t interval,
                int32_t* dots) {
    for (int64_t first = 0; first < quads; first += interval) {
        int16x8_t sums[Tokens][8] = {};
        for (int64_t i = first; i < least(quads, first + interval); ++i) {
            const Codes codes = load_codes<Centred>(weights + i * kVector);
#pragma GCC unroll 2
            for (int t = 0; t < Tokens; ++t) {
                const int8x16_t token = broadcast(q + t * stride + 4 * i);
#pragma GCC unroll 4
                for (int v = 0; v < 4; ++v) {
                    int16x8_t* const sum = sums[t] + 2 * v;
                    sum[0] = vmlal_s8(sum[0], vget_low_s8(codes.of[v]), vget_low_s8(token));
                    sum[1] = vmlal_high_s8(sum[1], codes.of[v], token);
                }
            }
        }
#pragma GCC unroll 2
        for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                int32_t* const to = dots + t * kTile + 4 * v;
                const int16x8_t* const sum = sums[t] + 2 * v;
                const int32x4_t four = vpaddq_s32(vpaddlq_s16(sum[0]), vpaddlq_s16(sum[1]));
                vst1q_s32(to, vaddq_s32(vld1q_s32(to), four));
            }
    }
}

class Micro {
  public:
    static constexpr int kTiles = 1;
    static constexpr int kTokens = 2;  // 16 sums and 4 weights of 32 registers
    static constexpr bool kAsksForLargest = true;

    Micro(const FormatSpec& format, int largest) : centred_(format.radix == 256) {
        const int weight = centred_ ? format.offset : (format.planes == 3 ? 8 : format.radix) - 1;
        interval_ = 32767 / (weight * (largest ? largest : 1));
    }

    bool wide() const { return false; }
    bool centred() const { return centred_; }

    void add(const int8_t* q, int64_t stride, const uint8_t* weights, int tokens, int64_t quads,
             int32_t* dots) const {
        const auto one = centred_ ? add_tokens<1, true> : add_tokens<1, false>;
        const auto two = centred_ ? add_tokens<2, true> : add_tokens<2, false>;
        (tokens == 2 ? two : one)(q, stride, weights, quads, interval_, dots);
    }

  private:
    bool centred_;
    int64_t interval_;  // quads whose products add up in int16
};

}  // namespace

std::unique_ptr<CpuKernel> make_quant_gemm_neon(const FormatSpec& format, const Attributes& attributes,
                                                GemmTerms terms) {
    if (i8mm_runs_here()) return make_quant_gemm_i8mm(format, attributes, terms);
    if (dotprod_runs_here()) return make_quant_gemm_dotprod(format, attributes, terms);
    return make_lookup_neon(format, make_tiled<Micro>(format, attributes, terms), terms);
}

}  // namespace d2d
