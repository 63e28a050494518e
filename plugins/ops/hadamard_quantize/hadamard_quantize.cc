// HadamardQuantize: ports, checks and dispatch.
#include "hadamard_quantize.h"

#include <stdexcept>
#include <string>

namespace d2d {
namespace {

std::string check_shapes(const Attributes& attributes, const std::vector<Shape>& shapes) {
    return check_row_shapes(attributes, shapes[0], shapes[1]);
}

std::unique_ptr<CpuKernel> make_cpu(const Attributes& attributes, Isa isa) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::avx512_vnni: return make_hadamard_quantize_avx512(attributes);
        case Isa::avx2: return make_hadamard_quantize_avx2(attributes);
#elif defined(__aarch64__)
        case Isa::neon: return make_hadamard_quantize_neon(attributes);
#endif
        case Isa::portable: return make_hadamard_quantize_portable(attributes);
        default:
            throw std::invalid_argument(std::string("HadamardQuantize has no kernel for ") + isa_name(isa));
    }
}

}  // namespace

std::string check_row_attributes(const Attributes& attributes) {
    const int64_t block = attributes.integer("block");
    if (block < 1 || block > 32768 || (block & (block - 1)))
        return "block must be a power of two from 1 to 32768, got " + std::to_string(block);
    const std::string& clip = attributes.text("clip");
    if (clip != "absmax" && clip != "gaussian")
        return "clip must be 'absmax' or 'gaussian', got '" + clip + "'";
    const std::string& grid = attributes.text("grid");
    if (grid != "mid-tread" && grid != "mid-rise")
        return "grid must be 'mid-tread' or 'mid-rise', got '" + grid + "'";
    return "";
}

std::string check_row_shapes(const Attributes& attributes, const Shape& x, const Shape& qmax) {
    const int64_t block = attributes.integer("block"), k = x.last();
    if (qmax.rank >= 0 && qmax.rank != 1)
        return "qmax must have one dimension, got " + std::to_string(qmax.rank);
    if (x.rank < 0 || qmax.rank < 0) return "";
    if (x.rank < 1) return "x must have at least one dimension";
    if (k == 0) return "x must not be empty along its last dimension";
    if (k > 0 && k % block)
        return "block " + std::to_string(block) + " does not divide the " + std::to_string(k) +
               " columns of x";
    if (is_packed(attributes)) {
        const std::string wrong = check_packed_columns(k);
        if (!wrong.empty()) return wrong;
    }
    bool known = qmax.dims[0] >= 0;
    for (int i = 0; i < x.rank; ++i) known = known && x.dims[i] >= 0;
    if (known && x.rows() > 0 && (qmax.dims[0] < 1 || x.rows() % qmax.dims[0]))
        return "qmax has " + std::to_string(qmax.dims[0]) + " values, which do not divide the " +
               std::to_string(x.rows()) + " rows of x";
    return "";
}

Definition hadamard_quantize() {
    return {
        "HadamardQuantize",
        1,
        {{"x", DType::stream}, {"qmax", DType::f32}},
        {{"q", DType::i8}, {"s", DType::f32}},
        {{"block", Attribute::Type::integer, 1, nullptr},
         {"clip", Attribute::Type::text, 0, "absmax"},
         {"grid", Attribute::Type::text, 0, "mid-tread"},
         kPacked,
         kStreamType},
        {{0, -1, kKeepLast, true}, {0, -1, 1}},
        check_row_attributes,
        check_shapes,
        make_cpu,
        plan_hadamard_quantize,
    };
}

}  // namespace d2d
