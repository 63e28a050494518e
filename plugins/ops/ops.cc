// THE list of native ops; tests/test_homes.py compares it with dit2deploy.ops.OPS.
#include "activation_hadamard_quantize/activation_hadamard_quantize.h"
#include "ada_ln_hadamard_quantize/ada_ln_hadamard_quantize.h"
#include "hadamard_quantize/hadamard_quantize.h"
#include "monarch/monarch.h"
#include "multi_region_quantize/multi_region_quantize.h"
#include "quant_gemm/quant_gemm.h"
#include "quant_matmul/quant_matmul.h"

namespace d2d {

const std::vector<Definition>& definitions() {
    static const std::vector<Definition> all = [] {
        std::vector<Definition> list = quant_gemms();
        list.insert(list.begin(), hadamard_quantize());
        list.push_back(monarch_add());
        list.push_back(multi_region_quantize());
        list.push_back(quant_matmul());
        list.push_back(ada_ln_hadamard_quantize());
        list.push_back(ada_ln_hadamard_quantize_keep());
        list.push_back(activation_hadamard_quantize());
        list.push_back(activation_hadamard_quantize_keep());
        list.push_back(gated_activation_hadamard_quantize());
        list.push_back(gated_activation_hadamard_quantize_keep());
        return list;
    }();
    return all;
}

}  // namespace d2d
