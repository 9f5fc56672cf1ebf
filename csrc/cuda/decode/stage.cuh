// What happens before a block attends: rotary embedding, queries into shared memory, new keys into it and the
// cache.
#pragma once
#include "work.cuh"

namespace zinit::cuda {

// Query rows first .. first + count of a key head, zeros up to `rows` rows and behind D.
template <class T>
__device__ __forceinline__ void stage_queries(const DecodeWork& w, const Sequence& s, int kv_head, int first,
                                              int count, int rows, const Shared<T>& shared) {
  const bool by_token =
      w.window_left >= 0 || w.window_right >= 0;  // else all queries turn by the first position
  for (int i = static_cast<int>(threadIdx.x); i < rows * shared.query_stride; i += kThreads) {
    const int row = i / shared.query_stride, d = i % shared.query_stride;
    T element = from_float<T>(0.f);
    if (row < count && d < w.head_dim) {
      const int token = (first + row) / w.group, head = kv_head * w.group + (first + row) % w.group;
      element = rotated(w, row_of<T>(w.query, s.index, head, token), d, s.length + (by_token ? token : 0));
    }
    shared.queries[i] = element;
  }
}

// New keys and values into shared memory, for the blocks that see them, and into the cache, by the one that
// appends. No block reads them from the cache: it may be another that writes there.
template <class T>
__device__ __forceinline__ void stage_new_tokens(const DecodeWork& w, const Share& share,
                                                 const Shared<T>& shared) {
  const Sequence& s = share.sequence;
  const auto head_dim = static_cast<int>(w.head_dim);
  if (!share.appends && !share.sees_new_keys()) return;
  for (int i = static_cast<int>(threadIdx.x); i < s.appended * head_dim; i += kThreads) {
    const int token = i / head_dim, d = i % head_dim, position = s.length + token;
    const T key = rotated(w, row_of<T>(w.new_key, s.index, share.kv_head, token), d, position);
    const T value = row_of<T>(w.new_value, s.index, share.kv_head, token)[d];
    shared.new_keys[i] = key;
    shared.new_values[i] = value;
    if (share.appends) write_to_cache(w, s.index, share.kv_head, position, d, key, value);
  }
}

// A tile of keys: lane l knows where key l % KEYS lies, and tells the others.
template <class T, int KEYS>
class KeyTile {
 public:
  __device__ __forceinline__ KeyTile(const DecodeWork& w, const Share& share, const Shared<T>& shared)
      : w_(w), share_(share), shared_(shared) {}

  // Ahead of use: the block table is read while the tile before is computed.
  __device__ __forceinline__ void find(int first) {
    const int key = first + static_cast<int>(threadIdx.x) % KEYS;
    found_ = key < share_.end ? locate(w_, share_.sequence, key) : CacheRow{0, 0};
  }
  __device__ __forceinline__ CacheRow row(int key) const {
    return {__shfl_sync(kAllLanes, found_.page, key), __shfl_sync(kAllLanes, found_.slot, key)};
  }
  __device__ __forceinline__ uint4 load_key(const CacheRow& row, int d, bool wanted) const {
    return load(w_.key_cache, shared_.new_keys, row, d, wanted);
  }
  __device__ __forceinline__ uint4 load_value(const CacheRow& row, int d, bool wanted) const {
    return load(w_.value_cache, shared_.new_values, row, d, wanted);
  }

 private:
  __device__ __forceinline__ uint4 load(const View& cache, const T* new_rows, const CacheRow& row, int d,
                                        bool wanted) const {
    const bool is_new = row.page < 0;
    uint4 vector =
        load_streaming(row_of<T>(cache, row.page, share_.kv_head, row.slot) + d, wanted && !is_new);
    if (wanted && is_new) vector = *reinterpret_cast<const uint4*>(new_rows + row.slot * w_.head_dim + d);
    return vector;
  }

  const DecodeWork& w_;
  const Share& share_;
  const Shared<T>& shared_;
  CacheRow found_;
};

}  // namespace zinit::cuda
