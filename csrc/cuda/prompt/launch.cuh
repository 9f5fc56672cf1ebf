// The launches of the prompt branch alone.
#pragma once
#include "kernel.cuh"

namespace zinit::cuda {

inline PromptWork prompt_work(const PromptParams& params) {
  PromptWork w{};
  static_cast<PromptParams&>(w) = params;
  w.group = static_cast<int>(w.num_heads_q / w.num_heads_kv);
  w.prompt_vectors = prompts_in_vectors(w, w.query.dtype);
  return w;
}

template <class T, int D>
void launch_prompt_of(const PromptWork& w, cudaStream_t stream) {
  using Shape = PromptShape<D>;
  constexpr int kSharedBytes = PromptShared<T, Shape>::kBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes);
  if (!ALLOW_SHARED((zinit_add_prompts<T, D>), kSharedBytes)) return;
  const int64_t blocks = (w.seqlen_q + Shape::kQueries - 1) / Shape::kQueries;
  const dim3 grid = grid_of(blocks, w.num_heads_q, w.num_sequences);
  LAUNCH((zinit_add_prompts<T, D>), grid, dim3(kThreads), kSharedBytes, stream, w);
}

template <class T>
void launch_prompt(const PromptWork& w, cudaStream_t stream) {
  with_head_dim(w.head_dim, [&]<int D>() { launch_prompt_of<T, D>(w, stream); });
}

}  // namespace zinit::cuda
