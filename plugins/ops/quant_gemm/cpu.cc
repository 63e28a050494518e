// The GEMMs in plain C++: the oracle of the other CPU kernels; reads every layout.
#include <algorithm>

#include "layout.h"
#include "quant_gemm.h"
#include "scratch.h"

namespace d2d {
namespace {

constexpr int64_t kOutputsATask = 16;

class Kernel : public CpuKernel {
  public:
    Kernel(const FormatSpec& format, const Attributes& attributes, GemmTerms terms)
        : format_(format), layout_(attributes.integer("layout")), terms_(terms) {}

    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const GemmProblem p(inputs, outputs, terms_);
        if (p.m == 0) return;
        parallel.run((p.n + kOutputsATask - 1) / kOutputsATask, [&](size_t task) {
            int16_t* weights = scratch<int16_t>(p.k);
            const int64_t end = std::min<int64_t>(p.n, (task + 1) * kOutputsATask);
            for (int64_t n = task * kOutputsATask; n < end; ++n) {
                unpack(p, n, weights);
                for (int64_t m = 0; m < p.m; ++m) p.y[m * p.n + n] = element(p, m, n, weights);
            }
        });
    }

  private:
    void unpack(const GemmProblem& p, int64_t n, int16_t* weights) const {
        for (int64_t k = 0; k < p.k; ++k)
            weights[k] = static_cast<int16_t>(layout_weight(format_, layout_, p.w, p.k, n, k));
    }

    static float element(const GemmProblem& p, int64_t m, int64_t n, const int16_t* weights) {
        const int64_t size = p.k / p.groups;
        float y = 0;
        for (int64_t group = 0; group < p.groups; ++group) {
            int32_t sum = 0;
            for (int64_t k = group * size; k < (group + 1) * size; ++k) sum += p.q[m * p.k + k] * weights[k];
            y += static_cast<float>(sum) * p.ws[n * p.groups + group];
        }
        y = y * p.s[m] + p.bias[n];
        for (int64_t r = 0; r < p.rank; ++r) y += p.t[m * p.rank + r] * p.up[n * p.rank + r];
        if (p.residual) y = p.residual[m * p.n + n] + p.gate[m / p.tokens_a_gate * p.n + n] * y;
        return y;
    }

    FormatSpec format_;
    int64_t layout_;
    GemmTerms terms_;
};

}  // namespace

std::unique_ptr<CpuKernel> make_quant_gemm_portable(const FormatSpec& format, const Attributes& attributes,
                                                    GemmTerms terms) {
    return std::make_unique<Kernel>(format, attributes, terms);
}

}  // namespace d2d
