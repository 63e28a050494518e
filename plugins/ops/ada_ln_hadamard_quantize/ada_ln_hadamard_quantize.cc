// AdaLnHadamardQuantize and AdaLnHadamardQuantizeKeep: ports, checks and dispatch.
#include "ada_ln_hadamard_quantize.h"

#include <algorithm>
#include <string>

#include "hadamard_quantize/prepared_rows.h"

namespace d2d {
namespace {

enum Input { kX, kShift, kScale, kEps, kQmax };

bool is_known(const Shape& shape) {
    return shape.rank >= 0 &&
           std::all_of(shape.dims, shape.dims + shape.rank, [](int64_t dim) { return dim >= 0; });
}

std::string check_shapes(const Attributes& attributes, const std::vector<Shape>& shapes) {
    const Shape &x = shapes[kX], &shift = shapes[kShift], &scale = shapes[kScale], &eps = shapes[kEps];
    const std::string wrong = check_row_shapes(attributes, x, shapes[kQmax]);
    if (!wrong.empty()) return wrong;
    if (is_known(eps) && (eps.rank != 1 || eps.dims[0] != 1)) return "eps must have the shape [1]";
    if (shift.rank == 0 || scale.rank == 0) return "shift and scale must have at least one dimension";
    if (!is_known(x) || !is_known(shift) || !is_known(scale)) return "";
    if (shift.last() != x.last() || scale.last() != x.last())
        return "shift and scale must have the " + std::to_string(x.last()) + " columns of x";
    if (shift.rows() != scale.rows())
        return "shift has " + std::to_string(shift.rows()) + " rows and scale " +
               std::to_string(scale.rows());
    if (x.rows() > 0 && (shift.rows() < 1 || x.rows() % shift.rows()))
        return "shift has " + std::to_string(shift.rows()) + " rows, which do not divide the " +
               std::to_string(x.rows()) + " rows of x";
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
    static void prepare(const Rows& rows, const Tensor* inputs, int64_t row, int64_t m, int64_t k, float* y) {
        const int64_t sample = row / (m / inputs[kShift].shape.rows()) * k;
        rows.modulate(inputs[kX].as<float>() + row * k, inputs[kShift].as<float>() + sample,
                      inputs[kScale].as<float>() + sample, *inputs[kEps].as<float>(), k, y);
    }
};

}  // namespace

Definition ada_ln_hadamard_quantize() {
    Definition definition = hadamard_quantize();  // whose attributes and checks of them it has
    definition.name = AdaLn::kName;
    definition.inputs = {{"x", DType::f32},
                         {"shift", DType::f32},
                         {"scale", DType::f32},
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
