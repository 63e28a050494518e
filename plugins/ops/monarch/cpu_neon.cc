// MonarchAdd for NEON: 4 floats a vector.
#include <arm_neon.h>

#include "tiles.h"

namespace d2d {
namespace {

struct Neon {
    static constexpr int kWidth = 4;
    static float32x4_t multiply_add(float32x4_t a, float32x4_t b, float32x4_t c) {
        return vfmaq_f32(c, a, b);
    }
};

}  // namespace

std::unique_ptr<CpuKernel> make_monarch_add_neon() {
    return std::unique_ptr<CpuKernel>(new TiledMonarch<Neon>());
}

}  // namespace d2d
