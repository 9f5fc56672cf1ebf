// What decoding does before it attends: rotary embedding, and the new keys and values into the cache.
#pragma once
#include "decode_tiles.inl"
#include "decode_work.h"

namespace zinit::cpu {
namespace {

// The address of a token of a head in a cache, contiguous or paged.
inline void* cache_row(const DecodeParams& p, const View& cache, int64_t b, int64_t head, int64_t token) {
  if (p.block_table == nullptr) return row_pointer(cache, b, head, token);
  const int32_t page = p.block_table[b * p.block_table_stride + token / p.page_size];
  return row_pointer(cache, page, head, token % p.page_size);
}

// n elements as floats, padded with zeros to whole vectors.
template <class T>
inline void load_row(const T* from, int64_t n, float* to) {
  for (int64_t d = 0; d < n; d += kLanes) store(to + d, load_columns(from, d, n));
}

// x, D floats, turns by the angles of `position`; the dimensions past rotary_dim stay.
inline void rotate(const DecodeParams& p, int64_t position, float* x) {
  float cos[kMaxHeadDim / 2], sin[kMaxHeadDim / 2];
  const int64_t half = p.rotary_dim / 2;
  const auto load_angles = [&](const void* table, float* to) {
    visit_rows(const_cast<void*>(table), p.rotary_stride, p.rotary_dtype,
               [&](auto rows) { load_row(rows[position], half, to); });
  };
  load_angles(p.rotary_cos, cos);
  load_angles(p.rotary_sin, sin);
  const int64_t step = p.rotary_interleaved ? 2 : 1, partner = p.rotary_interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i * step], b = x[i * step + partner];
    x[i * step] = a * cos[i] - b * sin[i];
    x[i * step + partner] = a * sin[i] + b * cos[i];
  }
}

// An item is one new token of one sequence.
inline int64_t append_items(const DecodeWork& w) {
  return w.new_key.data ? w.num_sequences * w.seqlen_new : 0;
}

template <class T>
inline void append(const DecodeWork& w, int64_t begin, int64_t end, void*) {
  float row[kMaxHeadDim];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / w.seqlen_new, t = item % w.seqlen_new, position = w.cache_seqlens[b] + t;
    for (int64_t h = 0; h < w.num_heads_kv; ++h) {
      load_row(static_cast<const T*>(row_pointer(w.new_key, b, h, t)), w.head_dim, row);
      if (w.rotary_cos) rotate(w, position, row);
      store_columns(row, broadcast(1.f), w.head_dim,
                    static_cast<T*>(cache_row(w, w.key_cache, b, h, position)));
      __builtin_memcpy(cache_row(w, w.value_cache, b, h, position), row_pointer(w.new_value, b, h, t),
                       static_cast<uint64_t>(w.head_dim) * sizeof(T));
    }
  }
}

}  // namespace
}  // namespace zinit::cpu
