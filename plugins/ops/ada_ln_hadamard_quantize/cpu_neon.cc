// AdaLnHadamardQuantize for NEON: 4 floats a vector.
#include "ada_ln_rows.h"

namespace d2d {

AdaLnRows ada_ln_rows_neon() { return AdaLnVectorRows<4>::rows(); }

}  // namespace d2d
