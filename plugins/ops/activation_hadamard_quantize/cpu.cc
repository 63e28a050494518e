// ActivationHadamardQuantize in plain C++: the oracle of the other CPU kernels, and what runs where there is none.
#include "activation_hadamard_quantize.h"

namespace d2d {
namespace {

void activate(Activation activation, const float* x, const float* factor, int64_t k, float* y) {
    for (int64_t i = 0; i < k; ++i) {
        const float active = activated<float, uint32_t>(activation, x[i]);
        y[i] = factor ? active * factor[i] : active;
    }
}

}  // namespace

ActivationRows activation_rows_portable() { return {1, activate, quantize_row_portable}; }

}  // namespace d2d
