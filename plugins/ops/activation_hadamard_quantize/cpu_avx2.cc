// ActivationHadamardQuantize for AVX2: 8 floats a vector.
#include "activation_rows.h"

namespace d2d {

ActivationRows activation_rows_avx2() { return ActivationVectorRows<8>::rows(); }

}  // namespace d2d
