// MonarchAdd: ports, checks and dispatch.
#include "monarch.h"

#include <stdexcept>
#include <string>

namespace d2d {
namespace {

std::string text(int64_t value) { return std::to_string(value); }

std::string check_attributes(const Attributes&) { return ""; }

// What is wrong with the factors alone.
std::string check_factors(const Shape& down, const Shape& up) {
    if ((down.rank >= 0 && down.rank != 3) || (up.rank >= 0 && up.rank != 3))
        return "down and up must have three dimensions";
    for (const Shape* shape : {&down, &up})
        for (int i = 0; i < shape->rank; ++i)
            if (shape->dims[i] == 0) return "down and up must not be empty";
    if (down.rank < 0 || up.rank < 0) return "";
    if (down.dims[1] != up.dims[1])
        return "down has rank " + text(down.dims[1]) + " and up has rank " + text(up.dims[1]);
    if (down.dims[0] % up.dims[0] || up.dims[2] % down.dims[2])
        return text(up.dims[0]) + " x " + text(down.dims[2]) +
               " blocks do not divide K = " + text(down.dims[0]) + " and N = " + text(up.dims[2]);
    return "";
}

std::string check_shapes(const Attributes&, const std::vector<Shape>& shapes) {
    const Shape &plain = shapes[0], &x = shapes[1], &down = shapes[2], &up = shapes[3];
    if (std::string fault = check_factors(down, up); !fault.empty()) return fault;
    for (const Shape& shape : shapes)
        if (shape.rank < 0) return "";
    if (plain.rank < 1 || x.rank != plain.rank)
        return "plain and x must have the same number of dimensions, at least one";
    for (int i = 0; i + 1 < plain.rank; ++i)
        if (plain.dims[i] >= 0 && x.dims[i] >= 0 && plain.dims[i] != x.dims[i])
            return "plain must have the rows of x: dimension " + text(i) + " is " + text(plain.dims[i]) +
                   " against " + text(x.dims[i]);
    if (x.last() != down.dims[0])
        return "x must have " + text(down.dims[0]) + " columns, the rows of down, got " + text(x.last());
    if (plain.last() != up.dims[2])
        return "plain must have " + text(up.dims[2]) + " columns, as up has, got " + text(plain.last());
    return "";
}

std::unique_ptr<CpuKernel> make_cpu(const Attributes&, Isa isa) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::avx512_vnni: return make_monarch_add_avx512();
        case Isa::avx2: return make_monarch_add_avx2();
#elif defined(__aarch64__)
        case Isa::neon: return make_monarch_add_neon();
#endif
        case Isa::portable: return make_monarch_add_portable();
        default: throw std::invalid_argument(std::string("MonarchAdd has no kernel for ") + isa_name(isa));
    }
}

}  // namespace

MonarchProblem::MonarchProblem(const Tensor* inputs, const Tensor* outputs)
    : m(inputs[0].shape.rows()),
      n(inputs[0].shape.last()),
      k(inputs[1].shape.last()),
      blocks_in(inputs[3].shape.dims[0]),
      blocks_out(inputs[2].shape.dims[2]),
      rank(inputs[2].shape.dims[1]),
      plain(inputs[0].as<float>()),
      x(inputs[1].as<float>()),
      down(inputs[2].as<float>()),
      up(inputs[3].as<float>()),
      y(outputs[0].as<float>()) {}

Definition monarch_add() {
    return {
        "MonarchAdd",
        1,
        {{"plain", DType::stream}, {"x", DType::stream}, {"down", DType::f32}, {"up", DType::f32}},
        {{"y", DType::stream}},
        {kStreamType},
        {{0, -1, kKeepLast}},
        check_attributes,
        check_shapes,
        make_cpu,
        plan_monarch_add,
    };
}

}  // namespace d2d
