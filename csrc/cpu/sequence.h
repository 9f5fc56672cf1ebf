// Where the rows of a sequence lie, which keys its queries see, which prompt row it has, and a thread's
// scratch.
#pragma once
#include "../params.h"
#include "tiles.h"
#include "work.h"

namespace zinit::cpu {
namespace {

inline void* row_pointer(const View& view, int64_t batch, int64_t head, int64_t token) {
  const int64_t offset = batch * view.batch + head * view.head + token * view.token;
  return static_cast<char*>(view.data) + offset * size_of(view.dtype);
}

// Sequence b of a batch, or of a packed batch.
struct Sequence {
  int64_t query_batch, first_query, queries;
  int64_t key_batch, first_key, keys;
  int64_t lse_head;  // distance of two heads in lse
  bool biased;
  const float* key_bias;  // [keys]

  Sequence(const AttentionParams& w, int64_t b) {
    const bool packed_q = w.cu_seqlens_q.given, packed_k = w.cu_seqlens_k.given;
    const int32_t *cu_q = w.cu_seqlens_q.data, *cu_k = w.cu_seqlens_k.data;
    query_batch = packed_q ? 0 : b;
    first_query = packed_q ? cu_q[b] : 0;
    queries = packed_q ? cu_q[b + 1] - first_query : w.seqlen_q;
    key_batch = packed_k ? 0 : b;
    first_key = packed_k ? cu_k[b] : 0;
    keys = packed_k ? cu_k[b + 1] - first_key : w.seqlen_k;
    lse_head = packed_q ? cu_q[w.num_sequences] : w.seqlen_q;
    biased = w.key_bias.given;
    key_bias = w.key_bias.data + (biased ? b * w.seqlen_k : 0);
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
  // The bias of the keys from `block` on; nullptr: they have none.
  const float* bias_from(int64_t block) const { return biased ? key_bias + block : nullptr; }
};

// Query i sees the keys lower(i) .. upper(i).
struct Visibility {
  int64_t offset, left, right, keys;

  Visibility(const AttentionParams& w, const Sequence& s)
      : offset(s.keys - s.queries), left(w.window_left), right(w.window_right), keys(s.keys) {}

  int64_t lower(int64_t i) const { return left < 0 ? 0 : max(0, i + offset - left); }
  int64_t upper(int64_t i) const { return right < 0 ? keys : max(0, min(keys, i + offset + right + 1)); }
  // The first query that sees key j or a later one, and the end of those that see key j or an earlier one.
  int64_t first_query(int64_t j) const { return right < 0 ? 0 : max(0, j - offset - right); }
  int64_t end_query(int64_t j, int64_t queries) const {
    return left < 0 ? queries : min(queries, j - offset + left + 1);
  }
  // Whether queries `first` .. `last` see the same keys.
  bool is_uniform(int64_t first, int64_t last) const {
    return lower(first) == lower(last) && upper(first) == upper(last);
  }
};

// The prompt branch of one sequence.
struct Prompt {
  int64_t row = -1, gate_row = 0;  // of the tables; row -1: no branch

  Prompt(const AttentionParams& w, int64_t b) {
    if (!w.prompt_key.given || w.prompt_length == 0) return;
    row = w.prompt_index.given ? w.prompt_index.data[b] : w.prompt_rows == 1 ? 0 : b;
    gate_row = w.gate_rows == 1 ? 0 : row;
  }
  bool given() const { return row >= 0; }
  // act(gate) of a query head; 0 without prompts.
  float gate(const AttentionParams& w, int64_t head) const {
    if (!given()) return 0.f;
    const float raw = w.gate[gate_row * w.num_heads_q + head];
    return w.tanh_gate ? __builtin_tanhf(raw) : raw;
  }
};

// Hands out pieces of a thread's scratch. With no memory behind it, it measures how much is needed.
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

inline void clear(float* to, int64_t count) {
  if (count > 0) __builtin_memset(to, 0, static_cast<uint64_t>(count) * sizeof(float));
}

}  // namespace
}  // namespace zinit::cpu
