// AdaLnHadamardQuantize in plain C++: the oracle of the other CPU kernels, and what runs where there is none.
#include <cmath>

#include "ada_ln_hadamard_quantize.h"

namespace d2d {
namespace {

// Sums in float64: another order of the additions shows in the float32 result of next to no row,
// unless its large terms cancel.
void modulate(const float* x, const float* shift, const float* scale, float eps, int64_t k, float* y) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < k; ++i) sum += x[i];
    const auto mean = static_cast<float>(sum / static_cast<double>(k));
    for (int64_t i = 0; i < k; ++i) {
        y[i] = x[i] - mean;
        squares += static_cast<double>(y[i]) * y[i];
    }
    const auto inverse = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(k) + eps));
    for (int64_t i = 0; i < k; ++i) y[i] = y[i] * inverse * (1 + scale[i]) + shift[i];
}

}  // namespace

AdaLnRows ada_ln_rows_portable() { return {1, modulate, quantize_row_portable}; }

}  // namespace d2d
