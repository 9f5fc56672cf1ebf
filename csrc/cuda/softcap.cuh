// A soft cap on scores. They are exponents of 2 here, so the cap is too: x becomes cap * tanh(x / cap).
#pragma once
#include "elements.cuh"

namespace zinit::cuda {

// As tanh of csrc/cpu/softcap.h.
__device__ __forceinline__ float tanh_of(float x) {
  const float size = fabsf(x), z = x * x;
  float y = -5.905871279537678e-3f;
  y = fmaf(y, z, 2.080538682639599e-2f);
  y = fmaf(y, z, -5.3786683827638626e-2f);
  y = fmaf(y, z, 1.3331958651542664e-1f);
  y = fmaf(y, z, -3.3333298563957214e-1f);
  const float far = 1.f - __fdividef(2.f, fast_exp2(size * (2.f * kLog2E)) + 1.f);
  return size >= 0.6f ? copysignf(far, x) : fmaf(x, z * y, x);
}

// An exponent that counts `scale` times; softcap > 0 is the cap of scaled scores.
__device__ __forceinline__ float capped(float x, float scale, float softcap) {
  const float cap = softcap * kLog2E;
  return cap * tanh_of(x * scale * (1.f / cap));
}

// The exponent of a scaled score, under the cap if there is one.
__device__ __forceinline__ float cap_exponent(const AttentionParams& w, float x) {
  return w.softcap > 0.f ? capped(x, 1.f, w.softcap) : x;
}

// A tile of scores in registers. Called inside a branch, once for each tile, so that a tile without a cap pays
// for the branch alone.
template <int TILES, int COLUMNS>
__device__ __forceinline__ void cap_tile(float (&scores)[TILES][COLUMNS][4], float scale, float softcap) {
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[t][n][i] = capped(scores[t][n][i], scale, softcap);
    }
  }
}

}  // namespace zinit::cuda
