// Where the rows of a sequence lie, which keys its queries see, and which prompt row it has.
#pragma once
#include "gemm.inl"

namespace zinit::cpu {
namespace {

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline void* row_pointer(const View& view, int64_t batch, int64_t head, int64_t token) {
  const int64_t offset = batch * view.batch + head * view.head + token * view.token;
  return static_cast<char*>(view.data) + offset * element_size(view.dtype);
}

// Sequence b of a batch or of a packed batch.
struct Sequence {
  int64_t query_batch, first_query, queries;
  int64_t key_batch, first_key, keys;
  int64_t lse_head;       // distance of two heads in lse
  const float* key_bias;  // [keys] or nullptr

  Sequence(const AttentionParams& p, int64_t b) {
    const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = p.cu_seqlens_k != nullptr;
    query_batch = packed_q ? 0 : b;
    first_query = packed_q ? p.cu_seqlens_q[b] : 0;
    queries = packed_q ? p.cu_seqlens_q[b + 1] - first_query : p.seqlen_q;
    key_batch = packed_k ? 0 : b;
    first_key = packed_k ? p.cu_seqlens_k[b] : 0;
    keys = packed_k ? p.cu_seqlens_k[b + 1] - first_key : p.seqlen_k;
    lse_head = packed_q ? p.cu_seqlens_q[p.num_sequences] : p.seqlen_q;
    key_bias = p.key_bias ? p.key_bias + b * p.seqlen_k : nullptr;
  }

  void* query_row(const View& view, int64_t head, int64_t i) const {
    return row_pointer(view, query_batch, head, first_query + i);
  }
  void* key_row(const View& view, int64_t head, int64_t j) const {
    return row_pointer(view, key_batch, head, first_key + j);
  }
  int64_t lse_index(int64_t num_heads, int64_t head, int64_t i) const {
    return (query_batch * num_heads + head) * lse_head + first_query + i;
  }
};

// Query i sees the keys lower(i) .. upper(i).
struct Visibility {
  int64_t offset, left, right, keys;

  Visibility(const AttentionParams& p, const Sequence& s)
      : offset(s.keys - s.queries), left(p.window_left), right(p.window_right), keys(s.keys) {}

  int64_t lower(int64_t i) const { return left < 0 ? 0 : max(0, i + offset - left); }
  int64_t upper(int64_t i) const { return right < 0 ? keys : max(0, min(keys, i + offset + right + 1)); }
  // The first query that sees key j or a later one, and the end of those that see key j or an earlier one.
  int64_t first_query(int64_t j) const { return right < 0 ? 0 : max(0, j - offset - right); }
  int64_t end_query(int64_t j, int64_t queries) const {
    return left < 0 ? queries : min(queries, j - offset + left + 1);
  }
};

// The prompt branch of one sequence.
struct Prompt {
  int64_t row = -1, gate_row = 0;  // of the tables; row -1: no branch

  Prompt(const AttentionParams& p, int64_t b) {
    if (p.prompt_key.data == nullptr || p.prompt_length == 0) return;
    row = p.prompt_index ? p.prompt_index[b] : p.prompt_rows == 1 ? 0 : b;
    gate_row = p.gate_rows == 1 ? 0 : row;
  }
  bool given() const { return row >= 0; }
  float gate(const AttentionParams& p, int64_t head) const {
    if (!given()) return 0.f;
    const float raw = p.gate[gate_row * p.num_heads_q + head];
    return p.tanh_gate ? __builtin_tanhf(raw) : raw;
  }
};

// Hands out pieces of a thread's scratch; with no memory behind it, it measures how much is needed.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

}  // namespace
}  // namespace zinit::cpu
