// QuantMatMul: ports, checks and dispatch.
#include "quant_matmul.h"

#include <stdexcept>
#include <string>

namespace d2d {
namespace {

std::string check_attributes(const Attributes&) { return ""; }

bool differ(int64_t one, int64_t other) { return one >= 0 && other >= 0 && one != other; }

std::string check_shapes(const Attributes&, const std::vector<Shape>& shapes) {
    constexpr const char* names[] = {"a", "sa", "b", "sb"};
    for (int i = 0; i < 4; ++i) {
        if (shapes[i].rank < 0) return "";
        if (shapes[i].rank != 4) return std::string(names[i]) + " must have four dimensions: [B, H, rows, K]";
        for (int axis = 0; axis < 2; ++axis)
            if (differ(shapes[i].dims[axis], shapes[0].dims[axis]))
                return std::string(names[i]) + " must have the items and heads of a";
    }
    const Shape &a = shapes[0], &sa = shapes[1], &b = shapes[2], &sb = shapes[3];
    if (differ(a.last(), b.last()))
        return "a has " + std::to_string(a.last()) + " columns and b " + std::to_string(b.last());
    if (differ(sa.last(), 1) || differ(sb.last(), 1)) return "the last dimensions of sa and sb must be 1";
    if (differ(a.dims[2], sa.dims[2]) || differ(b.dims[2], sb.dims[2]))
        return "sa must have the rows of a, and sb those of b";
    return "";
}

std::unique_ptr<CpuKernel> make_cpu(const Attributes&, Isa isa) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::avx512_vnni: return make_quant_matmul_avx512();
        case Isa::avx2: return make_quant_matmul_avx2();
#elif defined(__aarch64__)
        // Loops for compilers, and NEON is what this one compiles for.
        case Isa::neon:
#endif
        case Isa::portable: return make_quant_matmul_portable();
        default: throw std::invalid_argument(std::string("QuantMatMul has no kernel for ") + isa_name(isa));
    }
}

}  // namespace

MatMulProblem::MatMulProblem(const Tensor* inputs, const Tensor* outputs)
    : heads(inputs[0].shape.dims[0] * inputs[0].shape.dims[1]),
      m(inputs[0].shape.dims[2]),
      n(inputs[2].shape.dims[2]),
      k(inputs[0].shape.last()),
      a(inputs[0].as<int8_t>()),
      sa(inputs[1].as<float>()),
      b(inputs[2].as<int8_t>()),
      sb(inputs[3].as<float>()),
      y(outputs[0].as<float>()) {}

Definition quant_matmul() {
    return {
        "QuantMatMul",
        1,
        {{"a", DType::i8}, {"sa", DType::f32}, {"b", DType::i8}, {"sb", DType::f32}},
        {{"y", DType::stream}},
        {kStreamType},
        {{0, 2, 2}},
        check_attributes,
        check_shapes,
        make_cpu,
        plan_quant_matmul,
    };
}

}  // namespace d2d
