// GeluHadamardQuantize and GeluHadamardQuantizeKeep: ports and dispatch; checks are HadamardQuantize's.
#include "gelu_hadamard_quantize.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "scratch.h"

namespace d2d {
namespace {

constexpr int64_t kRowsATask = 8;
enum Output { kQ, kS, kY };

class Kernel : public CpuKernel {
  public:
    Kernel(const Attributes& attributes, const GeluRows& rows, bool keep)
        : quantization_(attributes), rows_(rows), keep_(keep) {}

    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const int64_t m = inputs[0].shape.rows(), k = inputs[0].shape.last();
        if (m == 0) return;
        const GeluRows rows = k % rows_.width ? gelu_rows_portable() : rows_;
        const int64_t rows_a_qmax = m / inputs[1].shape.count();
        parallel.run(static_cast<size_t>((m + kRowsATask - 1) / kRowsATask), [&](size_t task) {
            auto* t = scratch<float>(static_cast<size_t>(k));
            const int64_t first = static_cast<int64_t>(task) * kRowsATask;
            for (int64_t row = first; row < std::min(m, first + kRowsATask); ++row) {
                float* y = keep_ ? outputs[kY].as<float>() + row * k : t;
                rows.activate(inputs[0].as<float>() + row * k, k, y);
                rows.quantize(quantization_, y, t, k, inputs[1].as<float>()[row / rows_a_qmax],
                              outputs[kQ].as<int8_t>() + row * k, outputs[kS].as<float>() + row);
            }
        });
    }

  private:
    RowQuantization quantization_;
    GeluRows rows_;
    bool keep_;
};

GeluRows rows_of(Isa isa) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::avx512_vnni: return gelu_rows_avx512();
        case Isa::avx2: return gelu_rows_avx2();
#endif
        case Isa::portable: return gelu_rows_portable();
        default:
            throw std::invalid_argument(std::string("GeluHadamardQuantize has no kernel for ") +
                                        isa_name(isa));
    }
}

template <bool Keep>
std::unique_ptr<CpuKernel> make_cpu(const Attributes& attributes, Isa isa) {
    return std::make_unique<Kernel>(attributes, rows_of(isa), Keep);
}

}  // namespace

Definition gelu_hadamard_quantize() {
    Definition definition = hadamard_quantize();  // whose ports, attributes and checks it has
    definition.name = "GeluHadamardQuantize";
    definition.make_cpu = make_cpu<false>;
    definition.plan_cuda = plan_gelu_hadamard_quantize;
    return definition;
}

Definition gelu_hadamard_quantize_keep() {
    Definition definition = gelu_hadamard_quantize();
    definition.name = "GeluHadamardQuantizeKeep";
    definition.outputs.push_back({"y", DType::f32});
    definition.shapes.push_back({0, -1, kKeepLast});
    definition.make_cpu = make_cpu<true>;
    return definition;
}

}  // namespace d2d
