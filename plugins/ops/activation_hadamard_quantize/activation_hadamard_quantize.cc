// ActivationHadamardQuantize, GatedActivationHadamardQuantize and both with Keep: ports, checks and dispatch.
#include "activation_hadamard_quantize.h"

#include <string>

#include "hadamard_quantize/prepared_rows.h"

namespace d2d {
namespace {

std::string check_attributes(const Attributes& attributes) {
    const std::string& activation = attributes.text("activation");
    if (activation != "gelu-tanh" && activation != "silu")
        return "activation must be 'gelu-tanh' or 'silu', got '" + activation + "'";
    return check_row_attributes(attributes);
}

std::string check_gated_shapes(const Attributes& attributes, const std::vector<Shape>& shapes) {
    const Shape &x = shapes[0], &factor = shapes[1];
    bool is_same = x.rank < 0 || factor.rank < 0 || x.rank == factor.rank;
    for (int i = 0; is_same && i < x.rank && i < factor.rank; ++i)
        is_same = x.dims[i] < 0 || factor.dims[i] < 0 || x.dims[i] == factor.dims[i];
    if (!is_same) return "factor must have the shape of x";
    return check_row_shapes(attributes, x, shapes[2]);
}

template <bool Gated>
class Activated {
  public:
    using Rows = ActivationRows;
    static constexpr const char* kName =
        Gated ? "GatedActivationHadamardQuantize" : "ActivationHadamardQuantize";
    static constexpr int kQmax = Gated ? 2 : 1;
    static Rows portable() { return activation_rows_portable(); }
    static Rows avx2() { return activation_rows_avx2(); }
    static Rows avx512() { return activation_rows_avx512(); }
    static Rows neon() { return activation_rows_neon(); }

    explicit Activated(const Attributes& attributes) : activation_(activation_of(attributes)) {}

    void prepare(const Rows& rows, const Tensor* inputs, int64_t row, int64_t /*m*/, int64_t k,
                 float* y) const {
        const float* factor = Gated ? inputs[1].as<float>() + row * k : nullptr;
        rows.activate(activation_, inputs[0].as<float>() + row * k, factor, k, y);
    }

  private:
    Activation activation_;
};

}  // namespace

Activation activation_of(const Attributes& attributes) {
    return attributes.text("activation") == "silu" ? Activation::silu : Activation::gelu;
}

Definition activation_hadamard_quantize() {
    Definition definition = hadamard_quantize();  // whose ports, attributes and checks it has, and one more
    definition.name = Activated<false>::kName;
    definition.attributes.insert(definition.attributes.begin(),
                                 {"activation", Attribute::Type::text, 0, "gelu-tanh"});
    definition.check_attributes = check_attributes;
    definition.make_cpu = make_prepared_rows<Activated<false>, false>;
    definition.plan_cuda = plan_activation_hadamard_quantize;
    return definition;
}

Definition activation_hadamard_quantize_keep() {
    return keeping_rows<Activated<false>>(activation_hadamard_quantize(), "ActivationHadamardQuantizeKeep");
}

Definition gated_activation_hadamard_quantize() {
    Definition definition = activation_hadamard_quantize();
    definition.name = Activated<true>::kName;
    definition.inputs.insert(definition.inputs.begin() + 1, {"factor", DType::stream});
    definition.check_shapes = check_gated_shapes;
    definition.make_cpu = make_prepared_rows<Activated<true>, false>;
    return definition;
}

Definition gated_activation_hadamard_quantize_keep() {
    return keeping_rows<Activated<true>>(gated_activation_hadamard_quantize(),
                                         "GatedActivationHadamardQuantizeKeep");
}

}  // namespace d2d
