// The splits of a query row become one. Where keys are split, the prompt term is added here and nowhere else.
#pragma once
#include "finish.cuh"
#include "stage.cuh"

namespace zinit::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads) zinit_decode_combine(const DecodeWork w) {
  DYNAMIC_SHARED(memory);
  const auto head_dim = static_cast<int>(w.head_dim);
  const SharedLayout layout(1, head_dim, sizeof(T), static_cast<int>(w.prompt_length), 0);
  const Shared<T> shared(memory, layout);
  float* weights = reinterpret_cast<float*>(memory + layout.bytes);  // [splits]
  const int row = static_cast<int>(blockIdx.x), kv_head = static_cast<int>(blockIdx.y);
  const Sequence sequence(w, static_cast<int>(blockIdx.z));
  stage_queries(w, sequence, kv_head, row, 1, 1, shared);
  __syncthreads();
  weigh_prompts(w, sequence.index, kv_head, row, 1, shared);
  grid_dependency_synchronize();  // nothing read above this line is written by the split kernel

  const int64_t at = partial_index(w, sequence.index, kv_head, row, 0);
  const float* states = w.states + 2 * at;
  if (threadIdx.x < 32) {
    float m = -INFINITY, l = 0.f;
    for (int s = static_cast<int>(threadIdx.x); s < w.splits; s += 32) m = fmaxf(m, states[2 * s]);
    m = warp_max(m);
    for (int s = static_cast<int>(threadIdx.x); s < w.splits; s += 32) {
      const float weight = states[2 * s + 1] == 0.f ? 0.f : fast_exp2(states[2 * s] - m);
      weights[s] = weight;
      l += weight * states[2 * s + 1];
    }
    l = warp_sum(l);
    if (threadIdx.x == 0) shared.states[0] = m, shared.states[1] = l;
  }
  __syncthreads();
  for (int d = static_cast<int>(threadIdx.x); d < head_dim; d += kThreads) {
    shared.merged[d] = weighted_sum(weights, w.partials + at * head_dim + d, head_dim, w.splits);
  }
  finish_rows(w, sequence.index, kv_head, row, 1, shared.states, shared);
}

}  // namespace zinit::cuda
