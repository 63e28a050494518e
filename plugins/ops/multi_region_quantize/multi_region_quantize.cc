// MultiRegionQuantize: ports, checks and dispatch.
#include "multi_region_quantize.h"

#include <stdexcept>
#include <string>

namespace d2d {
namespace {

std::string check_attributes(const Attributes&) { return ""; }

std::string check_shapes(const Attributes&, const std::vector<Shape>& shapes) {
    const Shape &x = shapes[0], &qmax = shapes[1], &regions = shapes[2];
    if (qmax.rank >= 0 && qmax.rank != 1)
        return "qmax must have one dimension, got " + std::to_string(qmax.rank);
    if (regions.rank >= 0 && (regions.rank != 2 || (regions.dims[1] >= 0 && regions.dims[1] != 3)))
        return "regions must be [R, 3]";
    if (qmax.rank >= 0 && regions.rank >= 0 && qmax.dims[0] >= 0 && regions.dims[0] >= 0 &&
        qmax.dims[0] != regions.dims[0])
        return "qmax has " + std::to_string(qmax.dims[0]) + " values and regions " +
               std::to_string(regions.dims[0]) + " rows";
    if (x.rank < 0 || qmax.rank < 0) return "";
    if (x.rank < 1) return "x must have at least one dimension";
    if (x.last() == 0) return "x must not be empty along its last dimension";
    bool known = qmax.dims[0] >= 0;
    for (int i = 0; i < x.rank; ++i) known = known && x.dims[i] >= 0;
    if (known && x.rows() > 0 && (qmax.dims[0] < 1 || x.rows() % qmax.dims[0]))
        return "qmax has " + std::to_string(qmax.dims[0]) + " values, which do not divide the " +
               std::to_string(x.rows()) + " rows of x";
    return "";
}

std::unique_ptr<CpuKernel> make_cpu(const Attributes&, Isa isa) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::avx512_vnni: return make_multi_region_quantize_avx512();
        case Isa::avx2: return make_multi_region_quantize_avx2();
#elif defined(__aarch64__)
        // Loops for compilers, and NEON is what this one compiles for.
        case Isa::neon:
#endif
        case Isa::portable: return make_multi_region_quantize_portable();
        default:
            throw std::invalid_argument(std::string("MultiRegionQuantize has no kernel for ") +
                                        isa_name(isa));
    }
}

}  // namespace

Definition multi_region_quantize() {
    return {
        "MultiRegionQuantize",
        1,
        {{"x", DType::stream}, {"qmax", DType::f32}, {"regions", DType::f32}},
        {{"q_low", DType::i8}, {"q_high", DType::i8}, {"s_low", DType::f32}, {"s_high", DType::f32}},
        {kStreamType},
        {{0, -1, kKeepLast}, {0, -1, kKeepLast}, {0, -1, 1}, {0, -1, 1}},
        check_attributes,
        check_shapes,
        make_cpu,
        plan_multi_region_quantize,
    };
}

}  // namespace d2d
