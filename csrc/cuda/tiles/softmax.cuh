// The online softmax of a warp's rows. Scores times `factor` are exponents of 2.
//
// The letters, here and in all kernels: a query meets its keys tile by tile. m is the largest score so far, p
// the weight exp(score - m) of a key, l the sum of all p, acc the sum of all p * value. A new tile can raise
// m; then l and acc, which stand for the old m, are multiplied by alpha = exp(m_old - m_new). In the end
// out = acc / l and lse = m + log(l).
#pragma once
#include "tile.cuh"

namespace zinit::cuda {

// Over the four lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// From here on rounding moves m by more than 1/2. A fused exponent would see by how much, and could be far
// above 0. So the scores are rounded as m was.
constexpr float kFusedBelow = 1 << 24;

template <class Shape>
struct Softmax {
  static constexpr int kRowTiles = Shape::kRowTiles;
  typename Shape::Rows m;
  typename Shape::Rows l;  // of this lane's columns; row_sum gives the whole

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
      m[t][0] = m[t][1] = -INFINITY;
      l[t][0] = l[t][1] = 0.f;
    }
  }

  // Scores become p; acc has to be multiplied by alpha.
  template <int COLUMNS>
  __device__ __forceinline__ void add(float (&scores)[kRowTiles][COLUMNS][4], float factor,
                                      typename Shape::Rows& alpha) {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
          most = fmaxf(most, fmaxf(scores[t][n][half * 2], scores[t][n][half * 2 + 1]));
        }
        most = fmaxf(m[t][half], __fmul_rn(row_max(most), factor));
        const float pivot = most == -INFINITY ? 0.f : most;
        alpha[t][half] = fast_exp2(m[t][half] - pivot);
        m[t][half] = most;
        l[t][half] *= alpha[t][half];
        float row_factor = factor;
        if (fabsf(pivot) >= kFusedBelow) {
          row_factor = 1.f;
#pragma unroll
          for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
            for (int i = half * 2; i < half * 2 + 2; ++i)
              scores[t][n][i] = __fmul_rn(scores[t][n][i], factor);
          }
        }
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
          for (int i = half * 2; i < half * 2 + 2; ++i) {
            scores[t][n][i] = fast_exp2(fmaf(scores[t][n][i], row_factor, -pivot));
            l[t][half] += scores[t][n][i];
          }
        }
      }
    }
  }
};

}  // namespace zinit::cuda
