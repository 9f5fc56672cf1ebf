// The entry to the prefill kernels: raw pointers in, launches on a stream, no torch.
//
// What the caller guarantees: bfloat16 or float16; head_dim 64, 80, 96, 128 or 256; one dtype for query,
// key_cache, value_cache and out, whose rows start at multiples of 16 bytes; fewer than kMaxRows rows.
#pragma once
#include "../../params.h"
#include "../stream.h"

namespace zinit::cuda {

// Appends the new keys and values if there are any, then attends. What only the device knows (cache_seqlens,
// cu_seqlens, block_table, prompt_index) is clamped there: with absurd values a call computes nonsense, but
// stays inside its tensors. The first queries of a packed sequence longer than seqlen_q are not computed:
// their rows of out and lse keep what they held.
void prefill(const PrefillParams& params, cudaStream_t stream);

// The parameters of a call of the cache function that is too long for the decode kernels.
inline PrefillParams prefill_params(const DecodeParams& decode) {
  PrefillParams p{};
  static_cast<DecodeParams&>(p) = decode;
  p.total_q = p.seqlen_q, p.total_k = p.seqlen_k;
  return p;
}

}  // namespace zinit::cuda
