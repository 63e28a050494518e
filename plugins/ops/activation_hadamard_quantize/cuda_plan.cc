// Which launch computes ActivationHadamardQuantize on a GPU: HadamardQuantize's, of the activated rows.
#include "activation_hadamard_quantize.h"

namespace d2d {

std::vector<CudaLaunch> plan_activation_hadamard_quantize(const Attributes& attributes,
                                                          const std::vector<Tensor>& inputs,
                                                          const std::vector<Tensor>& outputs) {
    const void* y = outputs.size() > 2 ? outputs[2].data : nullptr;
    return plan_rows({"activation_hadamard_quantize", "activation_hadamard_quantize_warps", 16}, attributes,
                     inputs[0], inputs[1], outputs, {word(y)}, {y});
}

}  // namespace d2d
