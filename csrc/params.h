// What a kernel is told: plain structs, a shape beside every pointer, no torch and no CUDA headers.
// Alphabet: B sequences, Hq / Hkv heads, T queries, S keys, P prompts, N prompt table rows, D head_dim.
#pragma once
#include <cstdint>

namespace zinit {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A [batch, head, token, D] tensor through its strides (in elements); the last dimension is contiguous.
// Packed tensors [total, head, D] are described as [1, head, total, D].
struct View {
  void* data = nullptr;  // nullptr: the tensor was not given, or its gradient is not wanted
  int64_t batch = 0;
  int64_t head = 0;
  int64_t token = 0;
  DType dtype = DType::kFloat32;
};

// The sizes, masks and prompt tables that forward, backward and decode share.
struct AttentionParams {
  int64_t num_sequences;  // B
  int64_t num_heads_q;    // Hq, a multiple of Hkv
  int64_t num_heads_kv;   // Hkv
  int64_t head_dim;       // D, 1 to 256
  int64_t seqlen_q;       // T; the longest one where packed
  int64_t seqlen_k;       // S; the longest one where packed

  const int32_t* cu_seqlens_q;  // [B + 1] or nullptr: sequence b owns rows cu[b] .. cu[b + 1]
  const int32_t* cu_seqlens_k;  // [B + 1] or nullptr
  const float* key_bias;        // [B, S] contiguous or nullptr: added to the scaled score, -inf = masked

  // Query i of sequence b sees keys j with i + offset - window_left <= j <= i + offset + window_right,
  // offset = its S - its T (bottom-right alignment). -1 = unlimited; causal is window_right = 0.
  int64_t window_left;
  int64_t window_right;
  float scale;

  View prompt_key;              // [N, Hkv, P, D]; data == nullptr or P == 0: no prompt branch
  View prompt_value;            // [N, Hkv, P, D]
  int64_t prompt_length;        // P, 0 to 128
  int64_t prompt_rows;          // N
  const int32_t* prompt_index;  // [B], row of sequence b, -1 = none; nullptr: row b, or 0 if N == 1
  const float* gate;            // [gate_rows, Hq] raw, contiguous
  int64_t gate_rows;            // 1, or N: the row is then that of the prompt table
  bool tanh_gate;               // act = tanh or identity
};

struct ForwardParams : AttentionParams {
  View query;  // [B, Hq, T, D]
  View key;    // [B, Hkv, S, D]
  View value;  // [B, Hkv, S, D]
  View out;    // [B, Hq, T, D], dtype of query
  float* lse;  // [B, Hq, T] contiguous (packed: [1, Hq, total]); natural log; -inf for a row without keys
};

// Gradients are written, not accumulated; a View without data is not wanted and costs nothing.
struct BackwardParams : AttentionParams {
  View query, key, value, out, grad_out;
  const float* lse;        // as written by forward
  const float* grad_lse;   // [B, Hq, T] or nullptr
  View grad_query;         // [B, Hq, T, D]
  View grad_key;           // [B, Hkv, S, D]
  View grad_value;         // [B, Hkv, S, D]
  View grad_prompt_key;    // [N, Hkv, P, D], dtype of prompt_key
  View grad_prompt_value;  // [N, Hkv, P, D]
  float* grad_gate;        // [gate_rows, Hq] or nullptr
};

// One call of the cache function: append new_key / new_value (rotated), rotate query, attend, add the
// prompts. seqlen_q = T new queries; seqlen_k = capacity of a sequence.
struct DecodeParams : AttentionParams {
  View query;      // [B, Hq, T, D]
  View key_cache;  // [B, Hkv, S, D], or pages [num_pages, Hkv, page_size, D]
  View value_cache;
  View new_key;  // [B, Hkv, T_new, D]; data == nullptr: nothing to append
  View new_value;
  int64_t seqlen_new;            // T_new
  const int32_t* cache_seqlens;  // [B], keys in the cache before the append
  const int32_t* block_table;    // [B, max_pages_per_sequence] or nullptr
  int64_t block_table_stride;
  int64_t page_size;
  int64_t num_pages;
  const void* rotary_cos;  // [>= S, rotary_dim / 2] or nullptr
  const void* rotary_sin;
  int64_t rotary_stride;
  int64_t rotary_positions;  // rows of the tables
  DType rotary_dtype;
  int64_t rotary_dim;  // even, <= D
  bool rotary_interleaved;
  bool rotate_by_token;  // query t turns by position cache_seqlens + t; without mask and window all by the
                         // first
  int64_t num_splits;    // 0 = choose
  View out;              // [B, Hq, T, D]
  float* lse;            // [B, Hq, T]
};

// Many queries by the CUDA kernels: over a cache, as above and appended to before, or over fresh keys, which
// then stand in key_cache and value_cache, without cache_seqlens.
struct PrefillParams : DecodeParams {
  int64_t total_q;  // rows of a packed query, all sequences together; else T
  int64_t total_k;
};

// out += act(gate) softmax(scale * q pk^T) pv, for whoever computed the token branch elsewhere.
struct PromptParams : AttentionParams {
  View query;       // [B, Hq, T, D]
  View out;         // [B, Hq, T, D], dtype of query, read and written
  int64_t total_q;  // as in PrefillParams
};

}  // namespace zinit
