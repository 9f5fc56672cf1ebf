// The entry to the decode kernels: raw pointers in, launches on a stream, no torch.
//
// What the caller guarantees: head_dim 64, 80, 96, 128 or 256; at most 16 queries and 16 new tokens in a
// sequence; caches of the query's dtype, whose rows start at multiples of 16 bytes.
#pragma once
#include "../../params.h"
#include "../stream.h"
#include "plan.h"

namespace zinit::cuda {

// `workspace`: workspace_floats(...) floats, 16-byte aligned, of any content. What only the device knows
// (cache_seqlens, block_table, prompt_index) is clamped there: with absurd values a call computes nonsense,
// but stays inside its tensors.
void decode(const DecodeParams& params, const DecodePlan& plan, float* workspace, cudaStream_t stream);

}  // namespace zinit::cuda
