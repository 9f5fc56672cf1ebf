#include "launch.cuh"

namespace zinit::cuda {
template void launch_prefill<fp16>(const PrefillWork&, cudaStream_t);
}
