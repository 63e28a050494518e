// What the ops share that prepare a row (norm and modulate it, activate it) and quantize it as HadamardQuantize does.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "hadamard_quantize.h"
#include "scratch.h"

namespace d2d {

// `Op` is a class, made of a node's attributes, with the type Rows (of one instruction set: `width`, `quantize` and what
// it prepares with), its functions `portable`, `avx2`, `avx512` and `neon`, the input index kQmax, its name kName, and
// prepare(rows, inputs, row, m, k, y): row `row` of m, prepared into y [k].
template <class Op>
typename Op::Rows prepared_rows_of(Isa isa) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::avx512_vnni: return Op::avx512();
        case Isa::avx2: return Op::avx2();
#elif defined(__aarch64__)
        case Isa::neon: return Op::neon();
#endif
        case Isa::portable: return Op::portable();
        default: throw std::invalid_argument(std::string(Op::kName) + " has no kernel for " + isa_name(isa));
    }
}

// With Keep the prepared row is an output, y; without, it is scratch memory.
template <class Op, bool Keep>
class PreparedRowsKernel : public CpuKernel {
  public:
    PreparedRowsKernel(const Attributes& attributes, Isa isa)
        : op_(attributes), quantization_(attributes), rows_(prepared_rows_of<Op>(isa)) {}

    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        constexpr int64_t kRowsATask = 8;
        const int64_t m = inputs[0].shape.rows(), k = inputs[0].shape.last();
        if (m == 0) return;
        const typename Op::Rows rows = k % rows_.width ? Op::portable() : rows_;
        const Tensor& qmax = inputs[Op::kQmax];
        auto* q = outputs[0].as<int8_t>();
        auto* s = outputs[1].as<float>();
        float* kept = Keep ? outputs[2].as<float>() : nullptr;
        const int64_t rows_a_qmax = m / qmax.shape.count();
        parallel.run(static_cast<size_t>((m + kRowsATask - 1) / kRowsATask), [&](size_t task) {
            auto* t = scratch<float>(static_cast<size_t>(k));
            const int64_t first = static_cast<int64_t>(task) * kRowsATask;
            for (int64_t row = first; row < std::min(m, first + kRowsATask); ++row) {
                float* y = Keep ? kept + row * k : t;
                op_.prepare(rows, inputs, row, m, k, y);
                rows.quantize(quantization_, y, t, k, qmax.as<float>()[row / rows_a_qmax], q + row * k,
                              s + row);
            }
        });
    }

  private:
    Op op_;
    RowQuantization quantization_;
    typename Op::Rows rows_;
};

template <class Op, bool Keep>
std::unique_ptr<CpuKernel> make_prepared_rows(const Attributes& attributes, Isa isa) {
    return std::make_unique<PreparedRowsKernel<Op, Keep>>(attributes, isa);
}

// The op beside `plain` that also gives the prepared rows, y.
template <class Op>
Definition keeping_rows(Definition plain, const char* name) {
    plain.name = name;
    plain.outputs.push_back({"y", DType::stream});
    plain.shapes.push_back({0, -1, kKeepLast});
    plain.make_cpu = make_prepared_rows<Op, true>;
    return plain;
}

}  // namespace d2d
