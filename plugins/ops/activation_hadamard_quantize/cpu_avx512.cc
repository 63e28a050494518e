// ActivationHadamardQuantize for AVX-512: 16 floats a vector.
#include "activation_rows.h"

namespace d2d {

ActivationRows activation_rows_avx512() { return ActivationVectorRows<16>::rows(); }

}  // namespace d2d
