// AdaLnHadamardQuantize and AdaLnHadamardQuantizeKeep: ports, checks and dispatch.
#include "ada_ln_hadamard_quantize.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "scratch.h"

namespace d2d {
namespace {

constexpr int64_t kRowsATask = 8;
enum Input { kX, kShift, kScale, kEps, kQmax };
enum Output { kQ, kS, kY };

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

class Kernel : public CpuKernel {
  public:
    Kernel(const Attributes& attributes, const AdaLnRows& rows, bool keep)
        : quantization_(attributes), rows_(rows), keep_(keep) {}

    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const int64_t m = inputs[kX].shape.rows(), k = inputs[kX].shape.last();
        if (m == 0) return;
        const AdaLnRows rows = k % rows_.width ? ada_ln_rows_portable() : rows_;
        const int64_t rows_a_sample = m / inputs[kShift].shape.rows(),
                      rows_a_qmax = m / inputs[kQmax].shape.count();
        parallel.run(static_cast<size_t>((m + kRowsATask - 1) / kRowsATask), [&](size_t task) {
            auto* t = scratch<float>(static_cast<size_t>(k));
            const int64_t first = static_cast<int64_t>(task) * kRowsATask;
            for (int64_t row = first; row < std::min(m, first + kRowsATask); ++row) {
                float* y = keep_ ? outputs[kY].as<float>() + row * k : t;
                const int64_t sample = row / rows_a_sample * k;
                rows.modulate(inputs[kX].as<float>() + row * k, inputs[kShift].as<float>() + sample,
                              inputs[kScale].as<float>() + sample, *inputs[kEps].as<float>(), k, y);
                rows.quantize(quantization_, y, t, k, inputs[kQmax].as<float>()[row / rows_a_qmax],
                              outputs[kQ].as<int8_t>() + row * k, outputs[kS].as<float>() + row);
            }
        });
    }

  private:
    RowQuantization quantization_;
    AdaLnRows rows_;
    bool keep_;
};

AdaLnRows rows_of(Isa isa) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::avx512_vnni: return ada_ln_rows_avx512();
        case Isa::avx2: return ada_ln_rows_avx2();
#endif
        case Isa::portable: return ada_ln_rows_portable();
        default:
            throw std::invalid_argument(std::string("AdaLnHadamardQuantize has no kernel for ") +
                                        isa_name(isa));
    }
}

template <bool Keep>
std::unique_ptr<CpuKernel> make_cpu(const Attributes& attributes, Isa isa) {
    return std::make_unique<Kernel>(attributes, rows_of(isa), Keep);
}

}  // namespace

Definition ada_ln_hadamard_quantize() {
    Definition definition = hadamard_quantize();  // whose attributes and checks of them it has
    definition.name = "AdaLnHadamardQuantize";
    definition.inputs = {{"x", DType::f32},
                         {"shift", DType::f32},
                         {"scale", DType::f32},
                         {"eps", DType::f32},
                         {"qmax", DType::f32}};
    definition.check_shapes = check_shapes;
    definition.make_cpu = make_cpu<false>;
    definition.plan_cuda = plan_ada_ln_hadamard_quantize;
    return definition;
}

Definition ada_ln_hadamard_quantize_keep() {
    Definition definition = ada_ln_hadamard_quantize();
    definition.name = "AdaLnHadamardQuantizeKeep";
    definition.outputs.push_back({"y", DType::f32});
    definition.shapes.push_back({0, -1, kKeepLast});
    definition.make_cpu = make_cpu<true>;
    return definition;
}

}  // namespace d2d
