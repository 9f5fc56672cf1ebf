// What decoding does before it attends: rotary embedding, and the new keys and values into the cache.
#pragma once
#include "../params.h"
#include "sequence.h"
#include "tiles.h"
#include "work.h"

namespace zinit::cpu {
namespace {

// The address of a token of a head in a cache, contiguous or paged.
inline void* cache_row(const DecodeParams& w, const View& cache, int64_t b, int64_t head, int64_t token) {
  if (!w.block_table.given) return row_pointer(cache, b, head, token);
  const int32_t page = w.block_table.data[b * w.block_table_stride + token / w.page_size];
  return row_pointer(cache, page, head, token % w.page_size);
}

// n elements as floats, padded with zeros to whole vectors.
template <class T>
inline void load_row(const T* from, int64_t n, float* to) {
  for (int64_t d = 0; d < n; d += kLanes) store(to + d, load_columns(from, d, n));
}

// x, D floats, turns by the angles of `position`. Dimensions past rotary.dim stay.
inline void rotate(const Rotary& rotary, int64_t position, float* x) {
  float cos[kMaxHeadDim / 2], sin[kMaxHeadDim / 2];
  const int64_t half = rotary.dim / 2;
  const auto load_angles = [&](const void* table, float* to) {
    visit_rows(const_cast<void*>(table), rotary.stride, rotary.dtype,
               [&](auto rows) { load_row(rows[position], half, to); });
  };
  load_angles(rotary.cos, cos);
  load_angles(rotary.sin, sin);
  const int64_t step = rotary.interleaved ? 2 : 1, partner = rotary.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i * step], b = x[i * step + partner];
    x[i * step] = a * cos[i] - b * sin[i];
    x[i * step + partner] = a * sin[i] + b * cos[i];
  }
}

// An item is one new token of one sequence.
int64_t append_items(const DecodeWork& w) { return w.num_sequences * w.seqlen_new; }

int64_t append_scratch(const DecodeWork&) { return 0; }

void append_run(const DecodeWork& w, int64_t begin, int64_t end, void*) {
  with_dtype(w.query.dtype, [&]<class T>() {
    float row[kMaxHeadDim];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / w.seqlen_new, t = item % w.seqlen_new;
      const int64_t position = w.cache_seqlens.data[b] + t;
      for (int64_t h = 0; h < w.num_heads_kv; ++h) {
        load_row(static_cast<const T*>(row_pointer(w.new_key, b, h, t)), w.head_dim, row);
        if (w.rotary.given) rotate(w.rotary, position, row);
        store_columns(row, broadcast(1.f), w.head_dim,
                      static_cast<T*>(cache_row(w, w.key_cache, b, h, position)));
        __builtin_memcpy(cache_row(w, w.value_cache, b, h, position), row_pointer(w.new_value, b, h, t),
                         static_cast<uint64_t>(w.head_dim) * sizeof(T));
      }
    }
  });
}

}  // namespace
}  // namespace zinit::cpu
