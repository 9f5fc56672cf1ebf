// The online softmax of a warp's rows. Scores times `factor` are exponents of 2.
#pragma once
#include "tile.cuh"

namespace zinit::cuda {

// Of the four lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// From here on rounding moves a maximum by more than 1/2. A fused exponent would see by how much and could be
// far above 0, so the scores are rounded as the maximum was.
constexpr float kFusedBelow = 1 << 24;

template <class Shape>
struct Softmax {
  static constexpr int kRowTiles = Shape::kRowTiles;
  typename Shape::Rows largest;
  typename Shape::Rows sum;  // of this lane's columns; row_sum gives the whole

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      largest[m][0] = largest[m][1] = -INFINITY;
      sum[m][0] = sum[m][1] = 0.f;
    }
  }

  // Scores become weights; what was weighted before has to be multiplied by `correction`.
  template <int COLUMNS>
  __device__ __forceinline__ void add(float (&scores)[kRowTiles][COLUMNS][4], float factor,
                                      typename Shape::Rows& correction) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
          most = fmaxf(most, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
        }
        most = fmaxf(largest[m][half], __fmul_rn(row_max(most), factor));
        const float pivot = most == -INFINITY ? 0.f : most;
        correction[m][half] = fast_exp2(largest[m][half] - pivot);
        largest[m][half] = most;
        sum[m][half] *= correction[m][half];
        float row_factor = factor;
        if (fabsf(pivot) >= kFusedBelow) {
          row_factor = 1.f;
#pragma unroll
          for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
            for (int i = half * 2; i < half * 2 + 2; ++i)
              scores[m][n][i] = __fmul_rn(scores[m][n][i], factor);
          }
        }
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
          for (int i = half * 2; i < half * 2 + 2; ++i) {
            scores[m][n][i] = fast_exp2(fmaf(scores[m][n][i], row_factor, -pivot));
            sum[m][half] += scores[m][n][i];
          }
        }
      }
    }
  }
};

}  // namespace zinit::cuda
