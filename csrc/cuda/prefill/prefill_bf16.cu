#include "launch.cuh"

namespace zinit::cuda {
template void launch_prefill<bf16>(const PrefillWork&, cudaStream_t);
}
