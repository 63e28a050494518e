// Stands in for the CPU kernels, which the TensorRT adapter never makes.
#include "activation_hadamard_quantize/activation_hadamard_quantize.h"
#include "ada_ln_hadamard_quantize/ada_ln_hadamard_quantize.h"
#include "hadamard_quantize/hadamard_quantize.h"
#include "monarch/monarch.h"
#include "multi_region_quantize/multi_region_quantize.h"
#include "quant_gemm/quant_gemm.h"
#include "quant_matmul/quant_matmul.h"

namespace d2d {

using Kernel = std::unique_ptr<CpuKernel>;

Kernel make_hadamard_quantize_portable(const Attributes &) { return nullptr; }
Kernel make_hadamard_quantize_avx2(const Attributes &) { return nullptr; }
Kernel make_hadamard_quantize_avx512(const Attributes &) { return nullptr; }
AdaLnRows ada_ln_rows_portable() { return {}; }
AdaLnRows ada_ln_rows_avx2() { return {}; }
AdaLnRows ada_ln_rows_avx512() { return {}; }
ActivationRows activation_rows_portable() { return {}; }
ActivationRows activation_rows_avx2() { return {}; }
ActivationRows activation_rows_avx512() { return {}; }
Kernel make_monarch_add_portable() { return nullptr; }
Kernel make_monarch_add_avx2() { return nullptr; }
Kernel make_monarch_add_avx512() { return nullptr; }
Kernel make_multi_region_quantize_portable() { return nullptr; }
Kernel make_multi_region_quantize_avx2() { return nullptr; }
Kernel make_multi_region_quantize_avx512() { return nullptr; }
Kernel make_quant_matmul_portable() { return nullptr; }
Kernel make_quant_matmul_avx2() { return nullptr; }
Kernel make_quant_matmul_avx512() { return nullptr; }
Kernel make_quant_gemm_portable(const FormatSpec &, const Attributes &,
                                GemmTerms) {
  return nullptr;
}
Kernel make_quant_gemm_avx2(const FormatSpec &, const Attributes &, GemmTerms) {
  return nullptr;
}
Kernel make_quant_gemm_avx512(const FormatSpec &, const Attributes &,
                              GemmTerms) {
  return nullptr;
}

} // namespace d2d
