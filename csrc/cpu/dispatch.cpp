// Which table of kernels runs on this processor. setup.py defines ZINIT_HAVE_<ISA> for each isa_*.cpp it
// compiled.
#include <cstdlib>
#include <string_view>

#include "../torch_stable.h"
#include "kernels.h"

namespace zinit::cpu {
namespace {

const KernelTable& choose() {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = variable ? variable : "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = limit != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && limit != "avx2" && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && limit != "avx512" && __builtin_cpu_supports("avx512bf16") &&
                           __builtin_cpu_supports("avx512vnni");
#if defined(ZINIT_HAVE_AVX512_BF16)
  if (avx512_bf16) return kAvx512Bf16Kernels;
#endif
#if defined(ZINIT_HAVE_AVX512)
  if (avx512) return kAvx512Kernels;
#endif
#if defined(ZINIT_HAVE_AVX2)
  if (avx2) return kAvx2Kernels;
#endif
#endif
  return kGenericKernels;
}

std::string capability() { return kernels().name; }

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace zinit::cpu

// Named here and not in operators.py: it is a fact about this library, not an operator of the package.
STABLE_TORCH_LIBRARY_FRAGMENT(zinit, m) { m.def("cpu_capability() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(zinit, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&zinit::cpu::capability));
}
