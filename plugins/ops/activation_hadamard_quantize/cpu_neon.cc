// ActivationHadamardQuantize for NEON: 4 floats a vector.
#include "activation_rows.h"

namespace d2d {

ActivationRows activation_rows_neon() { return ActivationVectorRows<4>::rows(); }

}  // namespace d2d
