// Which launch computes AdaLnHadamardQuantize on a GPU: HadamardQuantize's, of the modulated rows.
#include <algorithm>

#include "ada_ln_hadamard_quantize.h"

namespace d2d {

std::vector<CudaLaunch> plan_ada_ln_hadamard_quantize(const Attributes& attributes,
                                                      const std::vector<Tensor>& inputs,
                                                      const std::vector<Tensor>& outputs, const CudaMeans&) {
    const Tensor &shift = inputs[1], &scale = inputs[2], &eps = inputs[3];
    const void* y = outputs.size() > 2 ? outputs[2].data : nullptr;
    return plan_rows({"ada_ln_hadamard_quantize", "ada_ln_hadamard_quantize_warps", 4}, attributes, inputs[0],
                     inputs[4], outputs,
                     {word(shift), word(scale), word(eps), word(y),
                      word(inputs[0].shape.rows() / std::max<int64_t>(shift.shape.rows(), 1))},
                     {shift.data, scale.data, y});
}

}  // namespace d2d
