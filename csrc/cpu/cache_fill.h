// What a prompt's pass does before it attends: rotary embedding in place, and the first keys and values of each
// sequence into its cache.
#pragma once
#include "decode_append.h"
#include "rows.h"

namespace zinit::cpu {
namespace {

constexpr int64_t kFillTokens = 8;  // of an item: about 2 us

// Packed tokens: query, new_key and new_value have rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] of sequence b.
int64_t fill_items(const DecodeWork& w) {
  return ceil_div(w.cu_seqlens_q.data[w.num_sequences], kFillTokens);
}

int64_t fill_scratch(const DecodeWork&) { return 0; }

template <class T>
inline void fill_token(const DecodeWork& w, int64_t b, int64_t row, int64_t position) {
  float cos[kMaxHeadDim / 2], sin[kMaxHeadDim / 2];
  const int64_t half = w.rotary.dim / 2;
  visit_rows(const_cast<void*>(w.rotary.cos), w.rotary.stride, w.rotary.dtype,
             [&](auto table) { load_row(table[position], half, cos); });
  visit_rows(const_cast<void*>(w.rotary.sin), w.rotary.stride, w.rotary.dtype,
             [&](auto table) { load_row(table[position], half, sin); });
  const auto turn = [&](const View& view, int64_t head) {
    T* x = static_cast<T*>(row_pointer(view, 0, head, row));
    rotate_head(x, cos, sin, broadcast(1.f), half, x);
    return x;
  };
  for (int64_t h = 0; h < w.num_heads_q; ++h) turn(w.query, h);
  const auto bytes = static_cast<uint64_t>(w.head_dim) * sizeof(T);
  for (int64_t h = 0; h < w.num_heads_kv; ++h) {
    __builtin_memcpy(row_pointer(w.key_cache, b, h, position), turn(w.new_key, h), bytes);
    __builtin_memcpy(row_pointer(w.value_cache, b, h, position), row_pointer(w.new_value, 0, h, row), bytes);
  }
}

void fill_run(const DecodeWork& w, int64_t begin, int64_t end, void*) {
  const int32_t* cu = w.cu_seqlens_q.data;
  int64_t row = begin * kFillTokens, b = 0;
  const int64_t last = min(end * kFillTokens, cu[w.num_sequences]);
  for (int64_t past = w.num_sequences; past - b > 1;) {  // cu[b] <= row < cu[past]
    const int64_t middle = (b + past) / 2;
    (cu[middle] <= row ? b : past) = middle;
  }
  with_dtype(w.query.dtype, [&]<class T>() {
    for (; row < last; ++row) {
      while (row >= cu[b + 1]) ++b;
      fill_token<T>(w, b, row, row - cu[b]);
    }
  });
}

}  // namespace
}  // namespace zinit::cpu
