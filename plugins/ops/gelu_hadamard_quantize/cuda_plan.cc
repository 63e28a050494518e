// Which launch computes GeluHadamardQuantize on a GPU: HadamardQuantize's, of the activated rows.
#include "gelu_hadamard_quantize.h"

namespace d2d {

std::vector<CudaLaunch> plan_gelu_hadamard_quantize(const Attributes& attributes,
                                                    const std::vector<Tensor>& inputs,
                                                    const std::vector<Tensor>& outputs) {
    std::vector<CudaLaunch> launches = plan_hadamard_quantize(attributes, inputs, {outputs[0], outputs[1]});
    for (CudaLaunch& launch : launches) {
        launch.function = "gelu_hadamard_quantize";
        launch.words.push_back(word(outputs.size() > 2 ? outputs[2].data : nullptr));
    }
    return launches;
}

}  // namespace d2d
