// GeluHadamardQuantize for AVX2: 8 floats a vector.
#include "gelu_rows.h"

namespace d2d {

GeluRows gelu_rows_avx2() { return GeluVectorRows<8>::rows(); }

}  // namespace d2d
