// MonarchAdd in plain C++: the oracle of the other CPU kernels, and what runs where there is none.
#include <algorithm>

#include "monarch.h"
#include "scratch.h"

namespace d2d {
namespace {

constexpr int64_t kTokensATask = 8;

class Kernel : public CpuKernel {
  public:
    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const MonarchProblem p(inputs, outputs);
        parallel.run(static_cast<size_t>((p.m + kTokensATask - 1) / kTokensATask), [&](size_t task) {
            float* z = scratch<float>(static_cast<size_t>(p.values()));
            const int64_t first = static_cast<int64_t>(task) * kTokensATask,
                          last = std::min(p.m, first + kTokensATask);
            for (int64_t m = first; m < last; ++m) {
                std::fill(z, z + p.values(), 0.0f);
                for (int64_t k = 0; k < p.k; ++k) {
                    float* block = z + k / p.width() * p.columns();
                    for (int64_t c = 0; c < p.columns(); ++c)
                        block[c] += p.x[m * p.k + k] * p.down[k * p.columns() + c];
                }
                for (int64_t o = 0; o < p.n; ++o) {
                    float sum = p.plain[m * p.n + o];
                    for (int64_t j = 0; j < p.inner(); ++j)
                        sum += z[j * p.blocks_out + o % p.blocks_out] * p.up[j * p.n + o];
                    p.y[m * p.n + o] = sum;
                }
            }
        });
    }
};

}  // namespace

std::unique_ptr<CpuKernel> make_monarch_add_portable() { return std::make_unique<Kernel>(); }

}  // namespace d2d
