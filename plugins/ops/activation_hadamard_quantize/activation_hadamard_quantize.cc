// ActivationHadamardQuantize and ActivationHadamardQuantizeKeep: ports and dispatch; checks are HadamardQuantize's.
#include "activation_hadamard_quantize.h"

#include "hadamard_quantize/prepared_rows.h"

namespace d2d {
namespace {

struct Gelu {
    using Rows = ActivationRows;
    static constexpr const char* kName = "ActivationHadamardQuantize";
    static constexpr int kQmax = 1;
    static Rows portable() { return activation_rows_portable(); }
    static Rows avx2() { return activation_rows_avx2(); }
    static Rows avx512() { return activation_rows_avx512(); }
    static Rows neon() { return activation_rows_neon(); }
    static void prepare(const Rows& rows, const Tensor* inputs, int64_t row, int64_t /*m*/, int64_t k,
                        float* y) {
        rows.activate(inputs[0].as<float>() + row * k, k, y);
    }
};

}  // namespace

Definition activation_hadamard_quantize() {
    Definition definition = hadamard_quantize();  // whose ports, attributes and checks it has
    definition.name = Gelu::kName;
    definition.make_cpu = make_prepared_rows<Gelu, false>;
    definition.plan_cuda = plan_activation_hadamard_quantize;
    return definition;
}

Definition activation_hadamard_quantize_keep() {
    return keeping_rows<Gelu>(activation_hadamard_quantize(), "ActivationHadamardQuantizeKeep");
}

}  // namespace d2d
