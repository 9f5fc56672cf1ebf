// The door to the kernel of the prompt branch alone; limits as in prefill.h, of query and out.
#pragma once
#include "../../params.h"
#include "../stream.h"

namespace zinit::cuda {

void add_prompt_branch(const PromptParams& params, cudaStream_t stream);

}  // namespace zinit::cuda
