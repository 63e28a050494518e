// Which instruction sets this machine runs, and which one the kernels use.
#pragma once

#include <string>

namespace d2d {

// Ordered: a machine that runs one runs those before it (of its architecture).
enum class Isa { portable = 0, avx2 = 1, avx512_vnni = 2, neon = 3 };

const char* isa_name(Isa);
// Throws std::invalid_argument, naming the known ones, for an unknown name.
Isa isa_from_name(const std::string&);
bool isa_runs_here(Isa);
// Byte permutations of AVX-512, which avx512_vnni uses where they are: on every machine with VNNI but the first.
bool vbmi_runs_here();
// Byte dot products of AVX2 alone (AVX-VNNI), which avx2 uses where they are.
bool avxvnni_runs_here();
// What neon uses where it is: products of 4 bytes (Armv8.2), and of 2 x 8 by 8 x 2 bytes (Armv8.6).
bool dotprod_runs_here();
bool i8mm_runs_here();
// The best one of this machine, or the one that the environment variable DIT2DEPLOY_CPU names
// (throws std::invalid_argument where that does not run here).
Isa isa_in_use();

}  // namespace d2d
