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

// Keys first .. first + kKeys that lie one after another. A thread copies the same 16 bytes of every kRows-th row, so
// each address is the one before plus a constant: computed anew, those of a tile were 376 of 1,000 instructions.
template <class T, class Shape>
__device__ __forceinline__ void stage_rows(const PrefillWork& w, const QueryBlock& block, int first, int end,
                                           T* keys, T* values) {
  constexpr int kVectors = Shape::kHeadDim / 8, kRows = kThreads / kVectors;
  const int first_row = static_cast<int>(threadIdx.x) / kVectors;
  const int d = static_cast<int>(threadIdx.x) % kVectors * 8;
  if (first_row >= kRows) return;
  const int64_t token = block.first_k + first + first_row;
  const T* key = row_of<T>(w.key_cache, block.batch, block.kv_head, token) + d;
  const T* value = row_of<T>(w.value_cache, block.batch, block.kv_head, token) + d;
#pragma unroll
  for (int pass = 0; pass < (Shape::kKeys + kRows - 1) / kRows; ++pass) {
    const int row = first_row + pass * kRows, to = row * Shape::kStride + d;
    if (Shape::kKeys % kRows != 0 && row >= Shape::kKeys) break;
    const bool wanted = first + row < end;
    copy_async(keys + to, key, wanted);
    copy_async(values + to, value, wanted);
    key += kRows * w.key_cache.token, value += kRows * w.value_cache.token;
  }
}

// Keys first .. first + kKeys; zeros from `end` on and where the bias is -inf, because the memory there may
// hold NaN.
template <class T, class Shape>
__device__ __forceinline__ void stage_keys(const PrefillWork& w, const QueryBlock& block, int first, int end,
                                           T* keys, T* values) {
  if (!w.block_table.given && !w.key_bias.given) {
    return stage_rows<T, Shape>(w, block, first, end, keys, values);
  }
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
