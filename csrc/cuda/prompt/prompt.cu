#include "launch.cuh"
#include "prompt.h"

namespace zinit::cuda {

void add_prompt_branch(const PromptParams& params, cudaStream_t stream) {
  if (params.num_sequences == 0 || params.seqlen_q == 0) return;
  const PromptWork w = prompt_work(params);
  if (w.query.dtype == DType::kBFloat16) {
    launch_prompt<bf16>(w, stream);
  } else {
    launch_prompt<fp16>(w, stream);
  }
}

}  // namespace zinit::cuda
