#include "launch.cuh"
#include "prompt.h"

namespace zinit::cuda {

void add_prompt_branch(const PromptParams& params, cudaStream_t stream) {
  if (params.num_sequences == 0 || params.seqlen_q == 0) return;
  const PromptWork w = prompt_work(params);
  with_half_dtype(w.query.dtype, [&]<class T>() { launch_prompt<T>(w, stream); });
}

}  // namespace zinit::cuda
