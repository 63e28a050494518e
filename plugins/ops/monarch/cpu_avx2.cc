// MonarchAdd for AVX2 with FMA: 8 floats a vector.
#include <immintrin.h>

#include "tiles.h"

namespace d2d {
namespace {

struct Avx2 {
    static constexpr int kWidth = 8;
    static __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace

std::unique_ptr<CpuKernel> make_monarch_add_avx2() {
    return std::unique_ptr<CpuKernel>(new TiledMonarch<Avx2>());
}

}  // namespace d2d
