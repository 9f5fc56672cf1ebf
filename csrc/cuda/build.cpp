// zinit::cuda_build: the CUDA toolkit and the chips that these kernels were compiled for. The build passes
// ZINIT_CUDA_BUILD, "13.0 sm_80 sm_90 compute_90": compute_ is PTX, which newer chips take too.
#include <string>

#include "../torch_stable.h"

namespace {

std::string cuda_build() { return ZINIT_CUDA_BUILD; }

}  // namespace

// Named here and not in operators.py: it is a fact about this library, not an operator of the package.
STABLE_TORCH_LIBRARY_FRAGMENT(zinit, m) { m.def("cuda_build() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(zinit, CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&cuda_build));
}
