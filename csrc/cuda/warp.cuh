// Reductions over the 32 lanes of a warp; every lane gets the result.
#pragma once
#include "block.h"
#include "device.cuh"

namespace zinit::cuda {

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

}  // namespace zinit::cuda
