// GeluHadamardQuantize for AVX-512: 16 floats a vector.
#include "gelu_rows.h"

namespace d2d {

GeluRows gelu_rows_avx512() { return GeluVectorRows<16>::rows(); }

}  // namespace d2d
