// The entry to the kernel of the prompt branch alone. The caller guarantees for query and out what prefill.h
// says.
#pragma once
#include "../../params.h"
#include "../stream.h"

namespace zinit::cuda {

void add_prompt_branch(const PromptParams& params, cudaStream_t stream);

}  // namespace zinit::cuda
