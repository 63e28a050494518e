// AdaLnHadamardQuantize for AVX-512: 16 floats a vector.
#include "ada_ln_rows.h"

namespace d2d {

AdaLnRows ada_ln_rows_avx512() { return AdaLnVectorRows<16>::rows(); }

}  // namespace d2d
