// What a prefill block works on: some queries of one head of one sequence, and the keys that any of them
// sees.
#pragma once
#include "../cache.cuh"
#include "../tiles/prompts.cuh"

namespace zinit::cuda {

template <int D>
using PrefillShape = TileShape<D, D <= 128 ? 2 : 1, D <= 64 ? 64 : 32>;  // what fits into 255 registers

constexpr int kUnlimited = kMaxRows;  // of a window: reaches past every key

struct PrefillWork : CacheWork {
  int64_t total_q, total_k;
  int group;                    // Hq / Hkv
  int reach_left, reach_right;  // the windows, kUnlimited where they are
  bool prompt_vectors;
};

// What is added to a key's scores in base 2. A finite bias stays finite: finfo.min times log2(e) would be -inf, and
// that means masked.
__device__ __forceinline__ float key_bias_log2(const PrefillWork& w, int batch, int key) {
  constexpr float kLowest = -1.6e38f;
  const float bias = w.key_bias.data[batch * w.seqlen_k + key];
  return bias == -INFINITY ? bias : fmaxf(bias, kLowest) * kLog2E;
}

// Where a key of a sequence lies.
struct KeyPlace {
  int64_t batch;  // of the tensor, or the page
  int slot;
};

struct QueryBlock {
  int sequence, head, kv_head;
  int batch;             // of the tensors: 0 where sequences are packed
  int first_q, queries;  // rows of the sequence
  int first_k, keys;
  int hidden;        // of the keys the first, which nothing sees
  int first, count;  // queries of the block
  int offset;        // position of the sequence's query 0 among its keys
  int rotary_start;  // position of the first new token

  __device__ static QueryBlock of_block(const PrefillWork& w, int queries_at_most) {
    QueryBlock b;
    b.sequence = static_cast<int>(blockIdx.z), b.head = static_cast<int>(blockIdx.y);
    b.kv_head = b.head / w.group;
    b.batch = b.sequence, b.first_q = b.first_k = b.hidden = b.rotary_start = 0;
    b.queries = static_cast<int>(w.seqlen_q), b.keys = static_cast<int>(w.seqlen_k);
    if (w.cu_seqlens_q.given) {
      const PackedRows q(w.cu_seqlens_q.data, b.sequence, w.total_q);
      const PackedRows k(w.cu_seqlens_k.data, b.sequence, w.total_k);
      b.batch = 0, b.first_q = q.first, b.queries = q.count, b.first_k = k.first, b.keys = k.count;
    } else if (w.cache_seqlens.given) {
      const Sequence s(w, b.sequence);
      b.keys = s.total, b.hidden = s.hidden, b.rotary_start = s.length;
    }
    b.offset = b.keys - b.queries;
    // the last queries see the most keys, so they come first: no long block is left for the end
    const int blocks = (b.queries + queries_at_most - 1) / queries_at_most;
    b.first = (blocks - 1 - static_cast<int>(blockIdx.x)) * queries_at_most;
    b.count = min(b.queries - b.first, queries_at_most);
    return b;
  }
  __device__ bool is_empty() const { return first < 0; }

  // The keys that a query of the block sees.
  __device__ int begin(const PrefillWork& w, int row) const {
    return max(first + row + offset - w.reach_left, hidden);
  }
  __device__ int end(const PrefillWork& w, int row) const {
    return min(first + row + offset + w.reach_right + 1, keys);
  }
  __device__ __forceinline__ KeyPlace locate(const PrefillWork& w, int key) const {
    if (!w.block_table.given) return {batch, first_k + key};
    const int page = w.by_page.quotient(key);
    return {max(page_of(w, sequence, page), 0), key - page * static_cast<int>(w.page_size)};
  }
};

}  // namespace zinit::cuda
