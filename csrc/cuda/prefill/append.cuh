// New keys and values into the cache, by a launch of its own: every block of the attending launch needs them
// all, and no block could wait for another one to write them.
#pragma once
#include "../cache.cuh"

namespace zinit::cuda {

constexpr int kTokensPerBlock = 16;

template <class T>
__global__ void __launch_bounds__(kThreads) zinit_append(const CacheWork w) {
  const Sequence sequence(w, static_cast<int>(blockIdx.z));
  const auto kv_head = static_cast<int>(blockIdx.y), head_dim = static_cast<int>(w.head_dim);
  const int first = static_cast<int>(blockIdx.x) * kTokensPerBlock;
  const int count = min(sequence.appended - first, kTokensPerBlock);
  for (int i = static_cast<int>(threadIdx.x); i < count * head_dim; i += kThreads) {
    const int token = first + i / head_dim, d = i % head_dim, position = sequence.length + token;
    const T key = rotated(w, row_of<T>(w.new_key, sequence.index, kv_head, token), d, position);
    const T value = row_of<T>(w.new_value, sequence.index, kv_head, token)[d];
    write_to_cache(w, sequence.index, kv_head, position, d, key, value);
  }
}

}  // namespace zinit::cuda
