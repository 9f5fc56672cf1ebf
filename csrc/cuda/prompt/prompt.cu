#include "kernel.cuh"
#include "prompt.h"

namespace zinit::cuda {
namespace {

template <class T, int D>
void launch(const PromptWork& w, cudaStream_t stream) {
  using Shape = PromptShape<D>;
  constexpr int kSharedBytes = PromptShared<T, Shape>::kBytes;
  const int64_t blocks = (w.seqlen_q + Shape::kQueries - 1) / Shape::kQueries;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(w.num_heads_q),
                  static_cast<unsigned>(w.num_sequences));
  ALLOW_SHARED((add_prompts_to_output<T, D>), kSharedBytes);
  LAUNCH((add_prompts_to_output<T, D>), grid, dim3(kThreads), kSharedBytes, stream, w);
}

template <class T>
void launch_of(const PromptWork& w, cudaStream_t stream) {
  switch (w.head_dim) {
    case 64:
      return launch<T, 64>(w, stream);
    case 80:
      return launch<T, 80>(w, stream);
    case 96:
      return launch<T, 96>(w, stream);
    case 128:
      return launch<T, 128>(w, stream);
    default:
      return launch<T, 256>(w, stream);
  }
}

}  // namespace

void add_prompt_branch(const PromptParams& params, cudaStream_t stream) {
  if (params.num_sequences == 0 || params.seqlen_q == 0) return;
  PromptWork w{};
  static_cast<PromptParams&>(w) = params;
  w.group = static_cast<int>(w.num_heads_q / w.num_heads_kv);
  w.prompt_vectors = prompts_in_vectors(w, w.query.dtype);
  if (w.query.dtype == DType::kBFloat16) {
    launch_of<bf16>(w, stream);
  } else {
    launch_of<fp16>(w, stream);
  }
}

}  // namespace zinit::cuda
