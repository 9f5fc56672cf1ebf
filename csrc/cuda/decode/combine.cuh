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
  float prompts[kDimsOfThread];
  sum_prompts<T>(w, sequence.index, kv_head, row, shared.scores, prompts);
  grid_dependency_synchronize();  // nothing read above this line is written by the split kernel

  const int64_t at = partial_index(w, sequence.index, kv_head, row, 0);
  if (threadIdx.x < 32) {
    constexpr int kOfLane = kMaxSplits / 32;
    const auto* states = reinterpret_cast<const float2*>(w.states) + at;  // m and l of each split
    float2 state[kOfLane];
    float m = -INFINITY, l = 0.f;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int s = static_cast<int>(threadIdx.x) + i * 32;
      state[i] = s < w.splits ? states[s] : make_float2(-INFINITY, 0.f);
      m = fmaxf(m, state[i].x);
    }
    m = warp_max(m);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int s = static_cast<int>(threadIdx.x) + i * 32;
      const float weight = state[i].y == 0.f ? 0.f : fast_exp2(state[i].x - m);
      if (s < w.splits) weights[s] = weight;
      l += weight * state[i].y;
    }
    l = warp_sum(l);
    if (threadIdx.x == 0) shared.states[0] = m, shared.states[1] = l;
  }
  __syncthreads();
  float acc[kDimsOfThread];
  each_dim(head_dim, [&](int i, int d) {
    acc[i] = weighted_sum(weights, w.partials + at * head_dim + d, head_dim, w.splits);
  });
  finish_row<T>(w, sequence.index, kv_head, row, shared.states[0], shared.states[1], acc, prompts);
}

}  // namespace zinit::cuda
