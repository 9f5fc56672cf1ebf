// The parameters of the kernels: plain structs, with the shape beside every pointer. No torch, no CUDA
// headers.
//
// Letters: B sequences, Hq / Hkv query and key heads, T queries, S keys, P prompts, N rows of the prompt
// table, D head_dim. A tensor that was not passed has given == false. Its pointer does not say so: a tensor
// without elements has no address, and was passed all the same.
#pragma once
#include <cstdint>

namespace zinit {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Bytes of an element; 0 for a number that names no dtype.
static constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
  }
  return 0;
}

// A [batch, head, token, D] tensor through its strides, counted in elements. The last dimension is
// contiguous. Packed tensors [total, head, D] are described as [1, head, total, D].
struct View {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t token = 0;
  DType dtype = DType::kFloat32;
  bool given = false;  // of a gradient: wanted
};

// A contiguous array.
template <class T>
struct Array {
  T* data = nullptr;
  bool given = false;
};

// The sizes, masks and prompt tables that forward, backward and decode share.
struct AttentionParams {
  int64_t num_sequences;  // B
  int64_t num_heads_q;    // Hq, a multiple of Hkv
  int64_t num_heads_kv;   // Hkv
  int64_t head_dim;       // D, 1 to 256
  int64_t seqlen_q;       // T; of packed sequences the longest
  int64_t seqlen_k;       // S; of packed sequences the longest

  Array<const int32_t> cu_seqlens_q;  // [B + 1]: sequence b owns rows cu[b] .. cu[b + 1]
  Array<const int32_t> cu_seqlens_k;  // [B + 1]
  Array<const float> key_bias;        // [B, S], added to the scaled score; -inf hides the key

  // Query i of sequence b sees keys j with i + offset - window_left <= j <= i + offset + window_right, where
  // offset is the S of the sequence minus its T (bottom-right alignment). -1 is unlimited; causal is
  // window_right = 0.
  int64_t window_left;
  int64_t window_right;
  float scale;
  float softcap;  // a scaled score s becomes softcap * tanh(s / softcap), before the bias; 0: it stays s

  View prompt_key;        // [N, Hkv, P, D]
  View prompt_value;      // [N, Hkv, P, D]; both given or neither
  int64_t prompt_length;  // P, 0 to 128
  int64_t prompt_rows;    // N
  // [B], the row of sequence b, -1 = none. Not given: row b, or row 0 if N is 1.
  Array<const int32_t> prompt_index;
  const float* gate;  // [gate_rows, Hq] before the activation; with prompts alone
  int64_t gate_rows;  // 1, or N: then the row is that of the prompt table
  bool tanh_gate;     // the activation is tanh, or else the identity

  // [Hq], a score per query head in the denominator of the token branch, as of a key that every query sees and
  // whose value is 0: out = sum_j e^{s_j} v_j / (sum_j e^{s_j} + e^{sink}). lse includes it.
  Array<const float> sinks;
};

struct ForwardParams : AttentionParams {
  View query;  // [B, Hq, T, D]
  View key;    // [B, Hkv, S, D]
  View value;  // [B, Hkv, S, D]
  View out;    // [B, Hq, T, D], dtype of query
  float*
      lse;  // [B, Hq, T] contiguous (packed: [1, Hq, total]); natural log; -inf for a row without keys and sink
};

// Gradients are written, not accumulated. One that is not given costs nothing.
struct BackwardParams : AttentionParams {
  View query, key, value, out, grad_out;
  const float* lse;             // as forward wrote it
  Array<const float> grad_lse;  // [B, Hq, T]
  View grad_query;              // [B, Hq, T, D]
  View grad_key;                // [B, Hkv, S, D]
  View grad_value;              // [B, Hkv, S, D]
  View grad_prompt_key;         // [N, Hkv, P, D], dtype of prompt_key
  View grad_prompt_value;       // [N, Hkv, P, D]
  Array<float> grad_gate;       // [gate_rows, Hq]
  Array<float> grad_sinks;      // [Hq]
};

// Rotary embedding of queries and new keys.
struct Rotary {
  const void* cos;    // [positions, dim / 2]
  const void* sin;    // the same
  int64_t stride;     // from row to row
  int64_t positions;  // rows
  int64_t dim;        // even, <= D: the first dimensions turn, the rest stay
  DType dtype;
  bool interleaved;  // pairs are (0, 1), (2, 3) ...; else (0, dim / 2), (1, dim / 2 + 1) ...
  bool by_token;     // query t turns by position cache_seqlens + t; without mask and window all by the first
  bool given;
};

// One call of the cache function: append new_key and new_value (keys rotated), rotate the queries, attend,
// add the prompts. seqlen_q is the number of queries of a sequence, seqlen_k the capacity of its cache.
struct DecodeParams : AttentionParams {
  View query;        // [B, Hq, T, D]
  View key_cache;    // [B, Hkv, S, D], or pages [num_pages, Hkv, page_size, D]
  View value_cache;  // the same
  View new_key;      // [B, Hkv, seqlen_new, D]; given: to be appended
  View new_value;
  int64_t seqlen_new;                  // 0 where nothing is to be appended
  Array<const int32_t> cache_seqlens;  // [B], keys in the cache before the append, the hidden ones too
  Array<const int32_t> cache_leftpad;  // [B]: the first slots of a sequence that no query sees
  Array<const int32_t> block_table;    // [B, block_table_stride]: the pages of sequence b in order
  int64_t block_table_stride;
  int64_t page_size;
  int64_t num_pages;
  Rotary rotary;
  int64_t num_splits;  // 0 = choose
  View out;            // [B, Hq, T, D]
  float* lse;          // [B, Hq, T]
};

// Many queries on CUDA: against a cache, as above, or against fresh keys, which are then key_cache and
// value_cache, without cache_seqlens.
struct PrefillParams : DecodeParams {
  int64_t total_q;  // rows of a packed query, all sequences together; else T
  int64_t total_k;
};

// out += act(gate) softmax(scale * q pk^T) pv, for a token branch that something else computed.
struct PromptParams : AttentionParams {
  View query;       // [B, Hq, T, D]
  View out;         // [B, Hq, T, D], dtype of query, read and written
  int64_t total_q;  // as in PrefillParams
};

}  // namespace zinit
