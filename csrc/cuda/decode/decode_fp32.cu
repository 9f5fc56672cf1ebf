#include "launch.cuh"

namespace zinit::cuda {
template void launch_decode<float>(const DecodeWork&, const DecodePlan&, cudaStream_t);
}
