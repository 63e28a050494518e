// The GEMMs for AVX2 with byte dot products (AVX-VNNI: Intel's client CPUs from Alder Lake on, which have no AVX-512).
// Bounds for M 256, K 1152, N 4608 on one core at 4 GHz that starts two products a cycle; no such CPU was at hand to
// measure:
//   operations 1.36 G multiply-adds, 32 an instruction, 256 G/s = 5.3 ms                              <- the bound
//   bytes w 1.3 MB (ternary) .. 5.3 MB (int8) + q 0.3 MB + y 4.7 MB: below 0.6 ms at 20 GB/s
// vpdpbusd takes unsigned codes and signed activations and is exact in int32 for every format. Ternary by activations of up
// to 4 bits is still looked up, lookup_avx2.cc. Compiles against SIMDe as well (D2D_SIMDE), so that it is tested on any
// machine.
#if defined(D2D_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#endif

#include "avx2_sums.h"
#include "tiles.h"

namespace d2d {
namespace {

// One token, 16 outputs: a and b += products of the 4 bytes at q. In assembly, for the reason that cpu_avx2.cc gives.
struct AddDots {
    [[gnu::always_inline]] void operator()(const int8_t* q, __m256i first, __m256i second, __m256i& a,
                                           __m256i& b) const {
#if defined(D2D_SIMDE)
        int32_t bytes;
        std::memcpy(&bytes, q, sizeof(bytes));
        const __m256i four = _mm256_set1_epi32(bytes);
        a = _mm256_dpbusd_epi32(a, first, four);
        b = _mm256_dpbusd_epi32(b, second, four);
#else
        __m256i four, sum_a = a, sum_b = b;
        asm volatile(
            "vpbroadcastd %3, %2\n\t"
            "%{vex%} vpdpbusd %2, %4, %0\n\t"
            "%{vex%} vpdpbusd %2, %5, %1"
            : "+x"(sum_a), "+x"(sum_b), "=&x"(four)
            : "m"(*reinterpret_cast<const int8_t (*)[4]>(q)), "x"(first), "x"(second));
        a = sum_a;
        b = sum_b;
#endif
    }
};

class Micro {
  public:
    static constexpr int kTokens = kMostTokens, kTiles = 1;
    static constexpr bool kAsksForLargest = false;

    Micro(const FormatSpec&, int) {}

    bool wide() const { return false; }
    bool centred() const { return false; }

    void add(const int8_t* q, int64_t stride, const uint8_t* weights, int tokens, int64_t quads,
             int32_t* dots) const {
        with_tokens(tokens, [&](auto count) {
            add_stretch<decltype(count)::value>(q, stride, weights, quads, dots, AddDots{},
                                                [](__m256i v) { return v; });
        });
    }
};

}  // namespace

std::unique_ptr<CpuKernel> make_quant_gemm_avxvnni(const FormatSpec& format, const Attributes& attributes,
                                                   GemmTerms terms) {
    return make_tiled<Micro>(format, attributes, terms);
}

}  // namespace d2d
