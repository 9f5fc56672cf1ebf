// The end of a query row of the token branch: what its acc is multiplied by, and its log-sum-exp.
#pragma once
#include "../params.h"
#include "block.h"
#include "device.cuh"

namespace zinit::cuda {

struct RowEnd {
  float factor, lse;
};

// m is an exponent of 2. A sink is one more p in l. Where keys are split, this is called for the merged row
// alone, so the sink counts once.
__device__ __forceinline__ RowEnd end_row(const AttentionParams& w, int head, float m, float l) {
  const float sink = w.sinks.given ? w.sinks.data[head] * kLog2E : -INFINITY;
  if (sink == -INFINITY) {
    if (l == 0.f) return {0.f, -INFINITY};
    return {1.f / l, m * kLn2 + logf(l)};
  }
  const float top = l == 0.f || sink > m ? sink : m;
  const float keys = l == 0.f ? 0.f : fast_exp2(m - top), sum = keys * l + fast_exp2(sink - top);
  return {keys / sum, top * kLn2 + logf(sum)};
}

}  // namespace zinit::cuda
