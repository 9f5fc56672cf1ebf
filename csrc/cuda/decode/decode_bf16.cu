#include "launch.cuh"

namespace zinit::cuda {
template void launch_decode<bf16>(const DecodeWork&, const DecodePlan&, cudaStream_t);
}
