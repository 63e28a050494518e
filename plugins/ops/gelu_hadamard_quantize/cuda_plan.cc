// Which launch computes GeluHadamardQuantize on a GPU: HadamardQuantize's, of the activated rows.
#include "gelu_hadamard_quantize.h"

namespace d2d {

std::vector<CudaLaunch> plan_gelu_hadamard_quantize(const Attributes& attributes,
                                                    const std::vector<Tensor>& inputs,
                                                    const std::vector<Tensor>& outputs, const CudaMeans&) {
    const void* y = outputs.size() > 2 ? outputs[2].data : nullptr;
    return plan_rows({"gelu_hadamard_quantize", "gelu_hadamard_quantize_warps", 16}, attributes, inputs[0],
                     inputs[1], outputs, {word(y)}, {y});
}

}  // namespace d2d
