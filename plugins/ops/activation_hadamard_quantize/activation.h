// Activations of the form x / (1 + 2^z): GELU by tanh, z = x (kGeluLinear + kGeluCubic x^2), and SiLU, z = kSilu x: shared
// by C++ and CUDA, free of any header.
//
// 2^z is 2^n, made of bits, times a polynomial of the rest: every step is an addition, a multiplication or a division
// of float32 in the order that is written here, so that all instruction sets give the same bits.
#pragma once

#if defined(__CUDACC_RTC__)
#define D2D_BOTH __device__ inline
#else
#define D2D_BOTH inline
#endif

namespace d2d {

enum class Activation { gelu, silu };

constexpr float kGeluLinear = -2.302208198f;  // -2 sqrt(2 / pi) / ln 2
constexpr float kGeluCubic = -0.1029432397f;  // times 0.044715
constexpr float kSilu = -1.442695041f;        // -1 / ln 2
constexpr float kMost = 126.0f;               // of |z|: 2^z is a normal float
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer, half to even

// Floats and Words: one float and one uint32_t, or vectors of as many of them.
template <class Floats, class Words>
D2D_BOTH Floats activated(Activation activation, Floats x) {
    const Floats most = Floats{} + kMost;
    Floats z = activation == Activation::silu ? x * kSilu : x * (kGeluLinear + kGeluCubic * (x * x));
    z = z < most ? z : most;  // NaN, too: what it divides is NaN
    z = z > -most ? z : -most;
    union {
        Floats value;
        Words bits;
    } power;
    power.value = z + kRound;
    const Floats f = z - (power.value - kRound);
    power.bits = (power.bits << 23) + (127u << 23);
    // (ln 2)^i / i!, i = 6 .. 1: 2^f for |f| <= 1/2 within 2e-7
    const Floats rest =
        (((((1.5403530e-4f * f + 1.3333558e-3f) * f + 9.6181291e-3f) * f + 5.5504109e-2f) * f +
          2.4022651e-1f) *
             f +
         6.9314718e-1f) *
            f +
        1.0f;
    return x / (1.0f + rest * power.value);
}

}  // namespace d2d
