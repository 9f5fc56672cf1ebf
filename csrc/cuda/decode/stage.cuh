// What happens before a block attends: queries, rotated, into shared memory; new keys into it and into the
// cache.
#pragma once
#include "work.cuh"

namespace zinit::cuda {

// Query rows first .. first + count of a key head; zeros up to `rows` rows and from D on.
template <class T>
__device__ __forceinline__ void stage_queries(const DecodeWork& w, const Sequence& s, int kv_head, int first,
                                              int count, int rows, const Shared<T>& shared) {
  constexpr int kAtOnce = 8;  // 4 heads of 128 dimensions in one round: each round waits for memory
  for (int i = static_cast<int>(threadIdx.x) * kAtOnce; i < rows * shared.query_stride;
       i += kThreads * kAtOnce) {
    const int row = i / shared.query_stride, d = i % shared.query_stride;
    T elements[kAtOnce] = {};
    if (row < count && d < w.head_dim) {
      const int token = (first + row) / w.group, head = kv_head * w.group + (first + row) % w.group;
      rotate(w, row_of<T>(w.query, s.index, head, token), d, s.length + (w.rotary.by_token ? token : 0),
             elements);
    }
    memcpy(static_cast<void*>(shared.queries + i), static_cast<const void*>(elements), sizeof elements);
  }
}

// New keys and values: into shared memory in every block that sees them, into the cache in the block that
// appends. No block reads them from the cache, because another block may be writing there.
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

// A tile of keys. Lane l knows where key l % KEYS and its value lie, in the cache or among the new ones in
// shared memory, and tells the other lanes. Slots past the last key of the share repeat that key and get the
// weight 0, so every load is unpredicated. With predicated loads ptxas unpacked each key before it issued the
// loads of the values, and a tile waited for memory several times.
template <class T, int KEYS>
class KeyTile {
 public:
  __device__ __forceinline__ KeyTile(const DecodeWork& w, const Share& share, const Shared<T>& shared)
      : w_(w), share_(share), shared_(shared) {}

  // Called one tile ahead: the block table is read while the tile before is computed.
  __device__ __forceinline__ void find(int first) {
    const int key = max(min(first + static_cast<int>(threadIdx.x) % KEYS, share_.end - 1), 0);
    const CacheRow at = locate(w_, share_.sequence, key);
    key_ = row_at(w_, w_.key_cache, share_.kv_head, at, shared_.new_keys);
    value_ = row_at(w_, w_.value_cache, share_.kv_head, at, shared_.new_values);
  }
  __device__ __forceinline__ const T* key(int i) const { return told(key_, i); }
  __device__ __forceinline__ const T* value(int i) const { return told(value_, i); }

 private:
  __device__ __forceinline__ static const T* told(const T* place, int i) {
    return reinterpret_cast<const T*>(__shfl_sync(kAllLanes, reinterpret_cast<uintptr_t>(place), i));
  }

  const DecodeWork& w_;
  const Share& share_;
  const Shared<T>& shared_;
  const T *key_, *value_;
};

}  // namespace zinit::cuda
