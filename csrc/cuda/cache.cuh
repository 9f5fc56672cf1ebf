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
  int hidden;  // the first keys, which nothing sees

  __device__ Sequence(const CacheWork& w, int b) : index(b) {
    const auto capacity = static_cast<int>(w.seqlen_k);
    length = min(max(w.cache_seqlens.data[b], 0), capacity);
    appended = min(static_cast<int>(w.seqlen_new), capacity - length);
    total = length + appended;
    hidden = w.cache_leftpad.given ? min(max(w.cache_leftpad.data[b], 0), total) : 0;
  }
};

// The page that the table names; one outside the pool gives -1.
__device__ __forceinline__ int page_of(const CacheWork& w, int sequence, int index) {
  const int page = w.block_table.data[sequence * w.block_table_stride + index];
  return page >= 0 && page < w.num_pages ? page : -1;
}

// Dimensions d .. d + N of a row, turned by the angles of `position`, rounded to the dtype that the cache
// would hold. All of it is asked for before any of it is used.
template <class T, int N>
__device__ __forceinline__ void rotate(const CacheWork& w, const T* row, int d, int position, T (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = row[d + i];
  const Rotary& rotary = w.rotary;
  if (!rotary.given || d >= rotary.dim) return;
  const int turned = static_cast<int>(rotary.dim), half = turned / 2;
  const int64_t angles = min(static_cast<int64_t>(position), rotary.positions - 1) * rotary.stride;
  T partner[N];
  int pair[N];
  bool second[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int at = min(d + i, turned - 1);
    second[i] = rotary.interleaved ? at % 2 : at >= half;
    pair[i] = rotary.interleaved ? at / 2 : second[i] ? at - half : at;
    partner[i] = row[rotary.interleaved ? at ^ 1 : second[i] ? at - half : at + half];
  }
  with_elements(rotary.cos, rotary.dtype, [&](const auto* cosines) {
    const auto* sines = static_cast<decltype(cosines)>(rotary.sin);
    std::remove_cvref_t<decltype(*cosines)> cosine[N], sine[N];
#pragma unroll
    for (int i = 0; i < N; ++i) cosine[i] = cosines[angles + pair[i]], sine[i] = sines[angles + pair[i]];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float turn = second[i] ? to_float(sine[i]) : -to_float(sine[i]);
      const float element = to_float(to[i]) * to_float(cosine[i]) + to_float(partner[i]) * turn;
      if (d + i < turned) to[i] = from_float<T>(element);
    }
  });
}

template <class T>
__device__ __forceinline__ T rotated(const CacheWork& w, const T* row, int d, int position) {
  T to[1];
  rotate(w, row, d, position, to);
  return to[0];
}

// Dimension d of a new key and value at their position; a table entry outside the pool writes nowhere.
template <class T>
__device__ __forceinline__ void write_to_cache(const CacheWork& w, int sequence, int kv_head, int position,
                                               int d, T key, T value) {
  int page = sequence, slot = position;
  if (w.block_table.given) {
    const int index = w.by_page.quotient(position);
    page = page_of(w, sequence, index);
    slot = position - index * static_cast<int>(w.page_size);
  }
  if (page < 0) return;
  row_of<T>(w.key_cache, page, kv_head, slot)[d] = key;
  row_of<T>(w.value_cache, page, kv_head, slot)[d] = value;
}

}  // namespace zinit::cuda
