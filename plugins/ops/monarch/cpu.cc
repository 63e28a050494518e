// MonarchAdd in plain C++: the oracle of the other CPU kernels, and what runs where there is none.
#include <algorithm>

#include "monarch.h"
#include "scratch.h"

namespace d2d {
namespace {

constexpr int64_t kTokensATask = 8;

float dot(const float* a, const float* b, int64_t count) {
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

class Kernel : public CpuKernel {
  public:
    void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const override {
        const MonarchProblem p(inputs, outputs);
        parallel.run(static_cast<size_t>((p.m + kTokensATask - 1) / kTokensATask), [&](size_t task) {
            float* z = scratch<float>(static_cast<size_t>(p.values()));
            const int64_t first = static_cast<int64_t>(task) * kTokensATask,
                          last = std::min(p.m, first + kTokensATask);
            for (int64_t m = first; m < last; ++m) {
                const float* x = p.x + m * p.k;
                for (int64_t a = 0; a < p.blocks_in; ++a)
                    for (int64_t row = 0; row < p.rows_down(); ++row)
                        z[p.place(a, row)] =
                            dot(p.down + (a * p.rows_down() + row) * p.width, x + a * p.width, p.width);
                for (int64_t o = 0; o < p.n; ++o) {
                    const int64_t b = o % p.blocks_out, s = o / p.blocks_out;
                    p.y[m * p.n + o] = p.plain[m * p.n + o] + dot(p.up + (b * p.height + s) * p.inner(),
                                                                  z + b * p.inner(), p.inner());
                }
            }
        });
    }
};

}  // namespace

std::unique_ptr<CpuKernel> make_monarch_add_portable() { return std::make_unique<Kernel>(); }

}  // namespace d2d
