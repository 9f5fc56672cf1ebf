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
  static_assert(kSharedBytes <= kSharedBytesAtMost);
  if (!ALLOW_SHARED((add_prompts_to_output<T, D>), kSharedBytes)) return;
  const int64_t blocks = (w.seqlen_q + Shape::kQueries - 1) / Shape::kQueries;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(w.num_heads_q),
                  static_cast<unsigned>(w.num_sequences));
  LAUNCH((add_prompts_to_output<T, D>), grid, dim3(kThreads), kSharedBytes, stream, w);
}

template <class T>
void launch_prompt(const PromptWork& w, cudaStream_t stream) {
  switch (w.head_dim) {
    case 64:
      return launch_prompt_of<T, 64>(w, stream);
    case 80:
      return launch_prompt_of<T, 80>(w, stream);
    case 96:
      return launch_prompt_of<T, 96>(w, stream);
    case 128:
      return launch_prompt_of<T, 128>(w, stream);
    default:
      return launch_prompt_of<T, 256>(w, stream);
  }
}

}  // namespace zinit::cuda
