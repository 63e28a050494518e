// Which launch computes ActivationHadamardQuantize on a GPU, gated or not: HadamardQuantize's, of the activated rows.
#include "activation_hadamard_quantize.h"

namespace d2d {

std::vector<CudaLaunch> plan_activation_hadamard_quantize(const Attributes& attributes,
                                                          const std::vector<Tensor>& inputs,
                                                          const std::vector<Tensor>& outputs,
                                                          const CudaMeans&) {
    const void* factor = inputs.size() > 2 ? inputs[1].data : nullptr;
    const void* y = outputs.size() > 2 ? outputs[2].data : nullptr;
    const auto activation = static_cast<int64_t>(activation_of(attributes));
    return plan_rows({"activation_hadamard_quantize", "activation_hadamard_quantize_warps", 16}, attributes,
                     inputs[0], inputs.back(), outputs, {word(y), word(factor), word(activation)},
                     {y, factor});
}

}  // namespace d2d
