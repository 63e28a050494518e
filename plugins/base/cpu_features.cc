// Reads the CPU's features once, and the environment variable that forces a variant.
#include "cpu_features.h"

#include <cstdlib>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#include <stdexcept>

namespace d2d {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512_vnni, Isa::neon};

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::portable: return "portable";
        case Isa::avx2: return "avx2";
        case Isa::avx512_vnni: return "avx512_vnni";
        case Isa::neon: return "neon";
    }
    return "unknown";
}

Isa isa_from_name(const std::string& name) {
    std::string known;
    for (Isa isa : kAll) {
        if (name == isa_name(isa)) return isa;
        known += std::string(known.empty() ? "" : ", ") + isa_name(isa);
    }
    throw std::invalid_argument("unknown instruction set '" + name + "'; known: " + known);
}

bool isa_runs_here(Isa isa) {
    switch (isa) {
        case Isa::portable: return true;
#if defined(__x86_64__)
        case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Isa::avx512_vnni:
#if defined(D2D_SIMDE)
            return true;  // the test library computes them by emulation
#else
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
#elif defined(__aarch64__)
        case Isa::neon: return true;  // part of the architecture
#endif
        default: return false;
    }
}

bool avxvnni_runs_here() {
#if !defined(__x86_64__) || !defined(D2D_AVXVNNI)
    return false;
#elif defined(D2D_SIMDE)
    return true;
#else
    return isa_runs_here(Isa::avx2) && __builtin_cpu_supports("avxvnni");
#endif
}

bool vbmi_runs_here() {
#if !defined(__x86_64__)
    return false;
#elif defined(D2D_SIMDE)
    return true;
#else
    return isa_runs_here(Isa::avx512_vnni) && __builtin_cpu_supports("avx512vbmi");
#endif
}

#if defined(__aarch64__)
// Bits of Linux's arch/arm64/include/uapi/asm/hwcap.h.
bool dotprod_runs_here() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool i8mm_runs_here() { return getauxval(AT_HWCAP2) >> 13 & 1; }
#endif

Isa isa_in_use() {
    if (const char* forced = std::getenv("DIT2DEPLOY_CPU"); forced && *forced) {
        const Isa isa = isa_from_name(forced);
        if (!isa_runs_here(isa))
            throw std::invalid_argument(std::string("DIT2DEPLOY_CPU=") + forced +
                                        " does not run on this CPU");
        return isa;
    }
    Isa best = Isa::portable;
    for (Isa isa : kAll)
        if (isa_runs_here(isa)) best = isa;
    return best;
}

}  // namespace d2d
