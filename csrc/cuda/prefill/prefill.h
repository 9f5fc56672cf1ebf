// The door to the prefill kernels: raw pointers in, launches on a stream, no torch.
//
// Limits, for whoever calls: bfloat16 or float16; head_dim 64, 80, 96, 128 or 256; query, key_cache,
// value_cache and out have one dtype, and their rows start at multiples of 16 bytes; fewer than kRowsAtMost
// rows.
#pragma once
#include "../../params.h"
#include "../stream.h"

namespace zinit::cuda {

// Appends what there is to append, then attends. What only the device knows (cache_seqlens, cu_seqlens,
// block_table, prompt_index) is clamped there: a call with absurd values computes nonsense, inside its
// tensors. Of a packed sequence longer than seqlen_q the first queries are not computed: their rows of out
// and lse stay as they were.
void prefill(const PrefillParams& params, cudaStream_t stream);

// A call of the cache function that is too long for the decode kernels.
inline PrefillParams prefill_params(const DecodeParams& decode) {
  PrefillParams p{};
  static_cast<DecodeParams&>(p) = decode;
  p.total_q = p.seqlen_q, p.total_k = p.seqlen_k;
  return p;
}

}  // namespace zinit::cuda
