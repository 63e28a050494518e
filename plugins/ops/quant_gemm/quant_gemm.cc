// The GEMMs: ports, checks and dispatch.
#include "quant_gemm.h"

#include <stdexcept>
#include <string>

#include "fragments.h"
#include "layout.h"

namespace d2d {
namespace {

std::string text(int64_t value) { return std::to_string(value); }

template <int Index>
std::string check_attributes(const Attributes& attributes) {
    const int64_t bits = attributes.integer("bits"), layout = attributes.integer("layout");
    if (bits < 2 || bits > 8) return "bits must be from 2 to 8, got " + text(bits);
    if (layout < 0 || layout >= kLayouts)
        return "layout " + text(layout) +
               " is not known to this library (0: interchange, 1: CPU kernels, 2: GPU kernels)";
    if (is_packed(attributes) && bits > 4)
        return "packed codes have at most 4 bits, this node's have " + text(bits);
    if (is_packed(attributes) && weight_bits(kFormats[Index]) > 4)
        return "packed codes are for weights of at most 4 bits";
    return "";
}

// What is wrong with the weights alone: all that can be said where the shape of the activations is not known.
std::string check_weights(const FormatSpec& format, int64_t layout, bool low_rank,
                          const std::vector<Shape>& shapes) {
    const Shape &w = shapes[2], &ws = shapes[3], &bias = shapes[4];
    if ((w.rank >= 0 && w.rank != 2) || (ws.rank >= 0 && ws.rank != 2))
        return "w and ws must have two dimensions";
    if (ws.rank < 0) return "";
    const int64_t n = ws.dims[0];
    if (bias.rank >= 0 && (bias.rank != 1 || bias.dims[0] != n))
        return "bias must hold " + text(n) + " values, one an output";
    const LayoutShape least = layout_shape(format, layout, n, 1);
    if (w.rank >= 0 && (w.dims[0] != least.rows || w.dims[1] < 1 || w.dims[1] % least.columns))
        return "w must be [" + text(least.rows) + ", a multiple of " + text(least.columns) + "] for " +
               text(n) + " outputs of " + format.name + " weights in layout " + text(layout) + ", got [" +
               text(w.dims[0]) + ", " + text(w.dims[1]) + "]";
    if (low_rank && shapes[6].rank >= 0 && (shapes[6].rank != 2 || shapes[6].dims[0] != n))
        return "up must be [" + text(n) + ", r]";
    return "";
}

// Of a port with as many dimensions as q.
std::string check_rows(const char* name, const Shape& shape, const Shape& q) {
    for (int i = 0; i + 1 < q.rank; ++i)
        if (q.dims[i] >= 0 && shape.dims[i] >= 0 && q.dims[i] != shape.dims[i])
            return std::string(name) + " must have the rows of q: dimension " + text(i) + " is " +
                   text(shape.dims[i]) + " against " + text(q.dims[i]);
    return "";
}

std::string check_stream(const Shape& residual, const Shape& gate, const Shape& q, int64_t n) {
    if (residual.rank != q.rank || (residual.last() >= 0 && residual.last() != n))
        return "residual must be [.., " + text(n) + "] with the rows of q";
    const std::string wrong = check_rows("residual", residual, q);
    return wrong.empty() ? check_sample_rows("gate", gate, "residual", residual) : wrong;
}

template <int Index, bool LowRank, bool Residual>
std::string check_shapes(const Attributes& attributes, const std::vector<Shape>& shapes) {
    constexpr FormatSpec format = kFormats[Index];
    for (const Shape& shape : shapes)
        if (shape.rank < 0) return check_weights(format, attributes.integer("layout"), LowRank, shapes);
    const Shape &q = shapes[0], &s = shapes[1], &w = shapes[2], &ws = shapes[3], &bias = shapes[4];
    if (q.rank < 1 || s.rank != q.rank)
        return "q and s must have the same number of dimensions, at least one";
    std::string wrong = check_rows("s", s, q);
    if (!wrong.empty()) return wrong;
    if (s.last() != 1) return "the last dimension of s must be 1, got " + text(s.last());
    if (w.rank != 2 || ws.rank != 2) return "w and ws must have two dimensions";
    const bool packed = is_packed(attributes);
    const int64_t k = packed ? 2 * q.last() : q.last(), n = ws.dims[0], groups = ws.dims[1];
    if (k <= 0) return "the columns of q must be known and at least one";
    if (packed) wrong = check_packed_columns(k);
    if (!wrong.empty()) return wrong;
    if (groups < 1 || k % groups)
        return text(groups) + " groups do not divide the " + text(k) + " columns of q";
    constexpr int64_t most = INT32_MAX / (128 * format.offset);  // |q| <= 128 times the largest |weight|
    if (k / groups > most)
        return "sums of " + text(k / groups) + " columns of " + format.name +
               " weights may leave int32: at most " + text(most) + " share a scale";
    if (bias.rank != 1 || bias.dims[0] != n) return "bias must hold " + text(n) + " values, one an output";
    const LayoutShape expected = layout_shape(format, attributes.integer("layout"), n, k);
    if (w.dims[0] != expected.rows || w.dims[1] != expected.columns)
        return "w must be [" + text(expected.rows) + ", " + text(expected.columns) + "] for " + text(n) +
               " outputs and " + text(k) + " columns of " + format.name + " weights, got [" +
               text(w.dims[0]) + ", " + text(w.dims[1]) + "]";
    if constexpr (LowRank) {
        const Shape &t = shapes[5], &up = shapes[6];
        if (t.rank != q.rank || up.rank != 2 || up.dims[0] != n || t.last() != up.dims[1])
            return "t must be [.., r] with the rows of q, and up [" + text(n) + ", r]";
        wrong = check_rows("t", t, q);
    }
    if constexpr (Residual) {
        constexpr int first = GemmTerms{LowRank, true}.first_residual();
        if (wrong.empty()) wrong = check_stream(shapes[first], shapes[first + 1], q, n);
    }
    return wrong;
}

template <int Index, bool LowRank, bool Residual>
std::unique_ptr<CpuKernel> make_cpu(const Attributes& attributes, Isa isa) {
    constexpr FormatSpec format = kFormats[Index];
    constexpr GemmTerms terms{LowRank, Residual};
    // The fast kernels read their own layout only; interchange words are for runtimes without a build step.
    if (attributes.integer("layout") != kCpuOrder) isa = Isa::portable;
    switch (isa) {
#if defined(__x86_64__)
        case Isa::avx512_vnni: return make_quant_gemm_avx512(format, attributes, terms);
        case Isa::avx2: return make_quant_gemm_avx2(format, attributes, terms);
#elif defined(__aarch64__)
        case Isa::neon: return make_quant_gemm_neon(format, attributes, terms);
#endif
        case Isa::portable: return make_quant_gemm_portable(format, attributes, terms);
        default: throw std::invalid_argument(std::string("the GEMMs have no kernel for ") + isa_name(isa));
    }
}

template <int Index, bool LowRank, bool Residual>
std::vector<CudaLaunch> plan_cuda(const Attributes& attributes, const std::vector<Tensor>& inputs,
                                  const std::vector<Tensor>& outputs, const CudaMeans& means) {
    return plan_quant_gemm(kFormats[Index], {LowRank, Residual}, attributes, inputs, outputs, means);
}

template <bool LowRank, bool Residual>
bool takes_tactic(const Attributes& attributes, const std::vector<Tensor>& inputs,
                  const std::vector<Tensor>& outputs, int tactic) {
    return quant_gemm_takes_tactic({LowRank, Residual}, attributes, inputs, outputs, tactic);
}

template <bool LowRank, bool Residual>
size_t workspace_cuda(const Attributes& attributes, const std::vector<Tensor>& inputs,
                      const std::vector<Tensor>& outputs) {
    return quant_gemm_workspace({LowRank, Residual}, attributes, inputs, outputs);
}

template <int Index, bool LowRank, bool Residual>
Definition define(const char* name) {
    Definition definition{
        name,
        1,
        {{"q", DType::i8}, {"s", DType::f32}, {"w", DType::i32}, {"ws", DType::f32}, {"bias", DType::f32}},
        {{"y", DType::stream}},
        {{"bits", Attribute::Type::integer, 8, nullptr},
         {"layout", Attribute::Type::integer, 0, nullptr},
         kPacked,
         kStreamType},
        {{0, 3, 0}},
        check_attributes<Index>,
        check_shapes<Index, LowRank, Residual>,
        make_cpu<Index, LowRank, Residual>,
        plan_cuda<Index, LowRank, Residual>,
        quant_gemm_tactics(),
        takes_tactic<LowRank, Residual>,
        workspace_cuda<LowRank, Residual>,
    };
    if (LowRank) {
        definition.inputs.push_back({"t", DType::f32});
        definition.inputs.push_back({"up", DType::f32});
    }
    if (Residual) {
        definition.inputs.push_back({"residual", DType::stream});
        definition.inputs.push_back({"gate", DType::stream});
    }
    return definition;
}

}  // namespace

GemmProblem::GemmProblem(const Tensor* inputs, const Tensor* outputs, GemmTerms terms, bool packed)
    : m(inputs[0].shape.rows()),
      n(inputs[3].shape.dims[0]),
      k(inputs[0].shape.last() * (packed ? 2 : 1)),
      groups(inputs[3].shape.dims[1]),
      rank(terms.low_rank ? inputs[5].shape.last() : 0),
      tokens_a_gate(1),
      packed(packed),
      q(inputs[0].as<int8_t>()),
      s(inputs[1].as<float>()),
      w(inputs[2].as<int32_t>()),
      ws(inputs[3].as<float>()),
      bias(inputs[4].as<float>()),
      t(terms.low_rank ? inputs[5].as<float>() : nullptr),
      up(terms.low_rank ? inputs[6].as<float>() : nullptr),
      residual(nullptr),
      gate(nullptr),
      y(outputs[0].as<float>()) {
    if (!terms.residual || !m) return;
    const Tensor* const stream = inputs + terms.first_residual();
    residual = stream[0].as<float>();
    gate = stream[1].as<float>();
    tokens_a_gate = m / stream[1].shape.rows();
}

// Each format plain, with a low-rank branch, with gate and residual, with both.
std::vector<Definition> quant_gemms() {
    return {
        define<0, false, false>("TernaryGemm"),
        define<1, false, false>("Int3Gemm"),
        define<2, false, false>("Int4Gemm"),
        define<3, false, false>("Int8Gemm"),
        define<0, true, false>("TernaryGemmLowRank"),
        define<1, true, false>("Int3GemmLowRank"),
        define<2, true, false>("Int4GemmLowRank"),
        define<3, true, false>("Int8GemmLowRank"),
        define<0, false, true>("TernaryGemmResidual"),
        define<1, false, true>("Int3GemmResidual"),
        define<2, false, true>("Int4GemmResidual"),
        define<3, false, true>("Int8GemmResidual"),
        define<0, true, true>("TernaryGemmLowRankResidual"),
        define<1, true, true>("Int3GemmLowRankResidual"),
        define<2, true, true>("Int4GemmLowRankResidual"),
        define<3, true, true>("Int8GemmLowRankResidual"),
    };
}

}  // namespace d2d
