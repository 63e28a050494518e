// GeluHadamardQuantize for NEON: 4 floats a vector.
#include "gelu_rows.h"

namespace d2d {

GeluRows gelu_rows_neon() { return GeluVectorRows<4>::rows(); }

}  // namespace d2d
