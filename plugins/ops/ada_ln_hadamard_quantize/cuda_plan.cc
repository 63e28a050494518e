// Which launch computes AdaLnHadamardQuantize on a GPU: HadamardQuantize's, of the modulated rows.
#include "ada_ln_hadamard_quantize.h"

namespace d2d {

std::vector<CudaLaunch> plan_ada_ln_hadamard_quantize(const Attributes& attributes,
                                                      const std::vector<Tensor>& inputs,
                                                      const std::vector<Tensor>& outputs) {
    std::vector<CudaLaunch> launches =
        plan_hadamard_quantize(attributes, {inputs[0], inputs[4]}, {outputs[0], outputs[1]});
    for (CudaLaunch& launch : launches) {
        launch.function = "ada_ln_hadamard_quantize";
        const std::vector<uint64_t> own = {word(inputs[1]), word(inputs[2]), word(inputs[3]),
                                           word(outputs.size() > 2 ? outputs[2].data : nullptr),
                                           word(inputs[0].shape.rows() / inputs[1].shape.rows())};
        launch.words.insert(launch.words.end(), own.begin(), own.end());
    }
    return launches;
}

}  // namespace d2d
