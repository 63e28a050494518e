// MonarchAdd for AVX-512: 16 floats a vector. Compiles against SIMDe as well (D2D_SIMDE), so that it is tested on any
// machine.
#if defined(D2D_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include "tiles.h"

namespace d2d {
namespace {

struct Avx512 {
    static constexpr int kWidth = 16;
    static __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

std::unique_ptr<CpuKernel> make_monarch_add_avx512() {
    return std::unique_ptr<CpuKernel>(new TiledMonarch<Avx512>());
}

}  // namespace d2d
