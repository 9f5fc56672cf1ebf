// Where the keys of a sequence lie, and what is appended to them.
#pragma once
#include "block.h"
#include "elements.cuh"

namespace zinit::cuda {

// n / divisor for 0 <= n < 2^31 by one multiplication: pages have any size.
struct Divider {
  unsigned magic, shift;

  static Divider by(int64_t divisor) {
    unsigned shift = 0;
    while ((int64_t{1} << shift) < divisor) ++shift;
    const uint64_t rest = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
    return {static_cast<unsigned>((rest << 32) / static_cast<uint64_t>(divisor) + 1), shift};
  }
  __device__ __forceinline__ int quotient(int n) const {
    const auto u = static_cast<unsigned>(n);
    return static_cast<int>((__umulhi(u, magic) + u) >> shift);
  }
};

struct CacheWork : DecodeParams {
  Divider by_page;
};

struct Sequence {
  int index;
  int length;    // keys before the append
  int appended;  // new keys that fit
  int total;

  __device__ Sequence(const CacheWork& w, int b) : index(b) {
    const auto capacity = static_cast<int>(w.seqlen_k);
    length = min(max(w.cache_seqlens[b], 0), capacity);
    appended = w.new_key.data ? min(static_cast<int>(w.seqlen_new), capacity - length) : 0;
    total = length + appended;
  }
};

// The page that the table names; one outside the pool gives -1.
__device__ __forceinline__ int page_of(const CacheWork& w, int sequence, int index) {
  const int page = w.block_table[sequence * w.block_table_stride + index];
  return page >= 0 && page < w.num_pages ? page : -1;
}

// Dimension d of a row, turned by the angles of `position`, rounded to the dtype that the cache would hold.
template <class T>
__device__ __forceinline__ T rotated(const CacheWork& w, const T* row, int d, int position) {
  if (!w.rotary_cos || d >= w.rotary_dim) return row[d];
  const int half = static_cast<int>(w.rotary_dim) / 2;
  const bool second = w.rotary_interleaved ? d % 2 : d >= half;
  const int pair = w.rotary_interleaved ? d / 2 : second ? d - half : d;
  const int partner = w.rotary_interleaved ? d ^ 1 : second ? d - half : d + half;
  const int64_t at = min(static_cast<int64_t>(position), w.rotary_positions - 1) * w.rotary_stride + pair;
  const float cosine = load_any(w.rotary_cos, at, w.rotary_dtype);
  const float sine = load_any(w.rotary_sin, at, w.rotary_dtype);
  return from_float<T>(to_float(row[d]) * cosine + to_float(row[partner]) * (second ? sine : -sine));
}

// Dimension d of a new key and value at their position; a table entry outside the pool writes nowhere.
template <class T>
__device__ __forceinline__ void write_to_cache(const CacheWork& w, int sequence, int kv_head, int position,
                                               int d, T key, T value) {
  int page = sequence, slot = position;
  if (w.block_table) {
    const int index = w.by_page.quotient(position);
    page = page_of(w, sequence, index);
    slot = position - index * static_cast<int>(w.page_size);
  }
  if (page < 0) return;
  row_of<T>(w.key_cache, page, kv_head, slot)[d] = key;
  row_of<T>(w.value_cache, page, kv_head, slot)[d] = value;
}

}  // namespace zinit::cuda
