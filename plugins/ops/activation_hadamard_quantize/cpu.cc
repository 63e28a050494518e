// ActivationHadamardQuantize in plain C++: the oracle of the other CPU kernels, and what runs where there is none.
#include "activation.h"
#include "activation_hadamard_quantize.h"

namespace d2d {
namespace {

void activate(const float* x, int64_t k, float* y) {
    for (int64_t i = 0; i < k; ++i) y[i] = gelu<float, uint32_t>(x[i]);
}

}  // namespace

ActivationRows activation_rows_portable() { return {1, activate, quantize_row_portable}; }

}  // namespace d2d
