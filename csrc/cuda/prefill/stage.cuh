// A block's queries and its tiles of keys and values, from global into shared memory.
#pragma once
#include "work.cuh"

namespace zinit::cuda {

constexpr int kStages = 2;  // tiles of keys at once: one is in use, the next in flight

template <class T, class Shape>
struct PrefillShared {
  static constexpr int kBytes =
      (Shape::kQueryElements + kStages * 2 * Shape::kKeyElements) * static_cast<int>(sizeof(T));
  T* queries;

  __device__ explicit PrefillShared(unsigned char* memory) : queries(reinterpret_cast<T*>(memory)) {}
  __device__ T* keys(int tile) const {
    return queries + Shape::kQueryElements + tile % kStages * 2 * Shape::kKeyElements;
  }
  __device__ T* values(int tile) const { return keys(tile) + Shape::kKeyElements; }
};

template <class T, class Shape>
__device__ __forceinline__ void stage_queries(const PrefillWork& w, const QueryBlock& block, T* queries) {
  const int first = block.first_q + block.first;
  if (!w.rotary.given) {
    return each_vector<Shape>(Shape::kQueries, [&](int row, int d) {
      const bool wanted = row < block.count;
      const T* from = row_of<T>(w.query, block.batch, block.head, first + (wanted ? row : 0)) + d;
      copy_async(queries + row * Shape::kStride + d, from, wanted);
    });
  }
  each_vector<Shape>(Shape::kQueries, [&](int row, int d) {
    const int token = block.first + row;
    T elements[8] = {};
    if (row < block.count) {
      rotate(w, row_of<T>(w.query, block.batch, block.head, token), d,
             block.rotary_start + (w.rotary.by_token ? token : 0), elements);
    }
    memcpy(queries + row * Shape::kStride + d, static_cast<const void*>(elements), sizeof elements);
  });
}

// Keys first .. first + kKeys; zeros from `end` on and where the bias is -inf, because the memory there may
// hold NaN.
template <class T, class Shape>
__device__ __forceinline__ void stage_keys(const PrefillWork& w, const QueryBlock& block, int first, int end,
                                           T* keys, T* values) {
  each_vector<Shape>(Shape::kKeys, [&](int row, int d) {
    int key = first + row;
    bool wanted = key < end;
    if (!wanted) key = first;
    if (w.key_bias.given) wanted = wanted && w.key_bias.data[block.batch * w.seqlen_k + key] != -INFINITY;
    const KeyPlace at = block.locate(w, key);
    const int to = row * Shape::kStride + d;
    copy_async(keys + to, row_of<T>(w.key_cache, at.batch, block.kv_head, at.slot) + d, wanted);
    copy_async(values + to, row_of<T>(w.value_cache, at.batch, block.kv_head, at.slot) + d, wanted);
  });
}

}  // namespace zinit::cuda
