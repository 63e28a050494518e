// AdaLnHadamardQuantize for AVX2: 8 floats a vector.
#include "ada_ln_rows.h"

namespace d2d {

AdaLnRows ada_ln_rows_avx2() { return AdaLnVectorRows<8>::rows(); }

}  // namespace d2d
