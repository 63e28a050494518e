// AdaLnHadamardQuantize and AdaLnHadamardQuantizeKeep: ports, checks and dispatch.
#include "ada_ln_hadamard_quantize.h"

#include <string>
#include <utility>

#include "hadamard_quantize/prepared_rows.h"

namespace d2d {
namespace {

enum Input { kX, kShift, kScale, kEps, kQmax };

std::string check_shapes(const Attributes& attributes, const std::vector<Shape>& shapes) {
    const Shape &x = shapes[kX], &shift = shapes[kShift], &scale = shapes[kScale], &eps = shapes[kEps];
    const std::string wrong = check_row_shapes(attributes, x, shapes[kQmax]);
    if (!wrong.empty()) return wrong;
    if (eps.is_known() && (eps.rank != 1 || eps.dims[0] != 1)) return "eps must have the shape [1]";
    for (const auto& [name, rows] : {std::pair("shift", shift), std::pair("scale", scale)}) {
        const std::string fault = check_sample_rows(name, rows, "x", x);
        if (!fault.empty()) return fault;
    }
    if (shift.is_known() && scale.is_known() && shift.rows() != scale.rows())
        return "shift has " + std::to_string(shift.rows()) + " rows and scale " +
               std::to_string(scale.rows());
    return "";
}

struct AdaLn {
    using Rows = AdaLnRows;
    static constexpr const char* kName = "AdaLnHadamardQuantize";
    static constexpr int kQmax = Input::kQmax;
    static Rows portable() { return ada_ln_rows_portable(); }
    static Rows avx2() { return ada_ln_rows_avx2(); }
    static Rows avx512() { return ada_ln_rows_avx512(); }
    static Rows neon() { return ada_ln_rows_neon(); }

    explicit AdaLn(const Attributes&) {}

    void prepare(const Rows& rows, const Tensor* inputs, int64_t row, int64_t m, int64_t k, float* y) const {
        const int64_t sample = row / (m / inputs[kShift].shape.rows()) * k;
        rows.modulate(inputs[kX].as<float>() + row * k, inputs[kShift].as<float>() + sample,
                      inputs[kScale].as<float>() + sample, *inputs[kEps].as<float>(), k, y);
    }
};

}  // namespace

Definition ada_ln_hadamard_quantize() {
    Definition definition = hadamard_quantize();  // whose attributes and checks of them it has
    definition.name = AdaLn::kName;
    definition.inputs = {{"x", DType::stream},
                         {"shift", DType::stream},
                         {"scale", DType::stream},
                         {"eps", DType::f32},
                         {"qmax", DType::f32}};
    definition.check_shapes = check_shapes;
    definition.make_cpu = make_prepared_rows<AdaLn, false>;
    definition.plan_cuda = plan_ada_ln_hadamard_quantize;
    return definition;
}

Definition ada_ln_hadamard_quantize_keep() {
    return keeping_rows<AdaLn>(ada_ln_hadamard_quantize(), "AdaLnHadamardQuantizeKeep");
}

}  // namespace d2d
