// Which prompts a sequence takes, and how much of them.
#pragma once
#include "elements.cuh"

namespace zinit::cuda {

// The row of the prompt table that a sequence takes; -1 = none, which an index outside the table also means.
__device__ __forceinline__ int prompt_row(const AttentionParams& w, int sequence) {
  if (!w.prompt_key.given || w.prompt_length == 0) return -1;
  const int row = w.prompt_index.given ? w.prompt_index.data[sequence] : w.prompt_rows == 1 ? 0 : sequence;
  return row >= 0 && row < w.prompt_rows ? row : -1;
}

__device__ __forceinline__ float gate_of(const AttentionParams& w, int table_row, int head) {
  return w.gate[(w.gate_rows > 1 ? table_row : 0) * w.num_heads_q + head];
}

// Whether a head has any use for its prompts. At gate 0 all bits are plain attention's, whatever the table
// holds.
__device__ __forceinline__ bool takes_prompts(const AttentionParams& w, int table_row, int head) {
  return gate_of(w, table_row, head) != 0.f;
}

// act(gate) of a head.
__device__ __forceinline__ float prompt_weight(const AttentionParams& w, int table_row, int head) {
  const float raw = gate_of(w, table_row, head);
  return w.tanh_gate ? tanhf(raw) : raw;
}

}  // namespace zinit::cuda
