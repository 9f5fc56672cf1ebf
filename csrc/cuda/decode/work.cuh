// What a decode block works on: its query rows, the keys of its split, where a key lies, what is in shared
// memory.
#pragma once
#include "../cache.cuh"
#include "plan.h"
#include "shared_layout.h"

namespace zinit::cuda {

struct DecodeWork : CacheWork {
  int group;       // Hq / Hkv
  int query_rows;  // T * group; row r is token r / group, head r % group of its key head
  int row_blocks;
  int splits;
  float* partials;  // [B, Hkv, T * group, splits, D]: acc (the letters are explained in tiles/softmax.cuh)
  float* states;    // [B, Hkv, T * group, splits, 2]: m (base 2) and l
};

// Which keys the query of a token sees.
struct Visible {
  int begin, end;

  Visible() = default;
  __device__ Visible(int from, int to) : begin(from), end(to) {}
  __device__ Visible(const DecodeWork& w, const Sequence& s, int token) {
    const int position = s.total - static_cast<int>(w.seqlen_q) + token;
    begin = s.hidden;
    if (w.window_left >= 0) begin = static_cast<int>(max(position - w.window_left, int64_t{begin}));
    end =
        w.window_right < 0 ? s.total : static_cast<int>(min(position + w.window_right + 1, int64_t{s.total}));
  }
  __device__ bool holds(int key) const { return key >= begin && key < end; }
};

// One block: some query rows of one key head of one sequence, against a share of the keys that any of them
// sees.
struct Share {
  Sequence sequence;
  int kv_head, first_row, rows, split;
  int begin, end;
  bool appends;

  template <int ROWS>
  __device__ static Share of_block(const DecodeWork& w) {
    const Sequence sequence(w, static_cast<int>(blockIdx.z));
    const int split = static_cast<int>(blockIdx.x), row_block = static_cast<int>(blockIdx.y) % w.row_blocks;
    const int first_row = row_block * ROWS, rows = min(ROWS, w.query_rows - first_row);
    const Visible first(w, sequence, first_row / w.group);
    const Visible last(w, sequence, (first_row + rows - 1) / w.group);
    const int keys = max(last.end - first.begin, 0),
              share = ((keys + w.splits - 1) / w.splits + 15) / 16 * 16;
    const int begin = min(first.begin + split * share, last.end), end = min(begin + share, last.end);
    const bool appends = sequence.appended > 0 && split == w.splits - 1 && row_block == 0;
    return {sequence, static_cast<int>(blockIdx.y) / w.row_blocks, first_row, rows, split, begin, end,
            appends};
  }
  __device__ bool sees_new_keys() const { return end > sequence.length; }
  // What one of its rows sees of the share's keys.
  __device__ Visible visible(const DecodeWork& w, int row) const {
    const Visible all(w, sequence, (first_row + row) / w.group);
    return {all.begin, min(all.end, end)};
  }
};

// Where a key of a sequence lies in the caches.
struct CacheRow {
  int page;  // -1: the slot-th new key, in shared memory
  int slot;
};

__device__ __forceinline__ CacheRow locate(const DecodeWork& w, const Sequence& s, int key) {
  if (key >= s.length) return {-1, key - s.length};
  if (!w.block_table.given) return {s.index, key};
  const int page = w.by_page.quotient(key);
  return {max(page_of(w, s.index, page), 0), key - page * static_cast<int>(w.page_size)};
}

// The key or value there.
template <class T>
__device__ __forceinline__ const T* row_at(const DecodeWork& w, const View& cache, int kv_head, CacheRow at,
                                           const T* new_rows) {
  return at.page < 0 ? new_rows + at.slot * w.head_dim : row_of<T>(cache, at.page, kv_head, at.slot);
}

template <class T>
struct Shared {
  T* queries;
  int query_stride, merged_stride;
  float *merged, *states, *scores;
  T *new_keys, *new_values;

  __device__ Shared(unsigned char* memory, const SharedLayout& at)
      : queries(reinterpret_cast<T*>(memory + at.queries)),
        query_stride(at.query_stride),
        merged_stride(at.merged_stride),
        merged(reinterpret_cast<float*>(memory + at.merged)),
        states(reinterpret_cast<float*>(memory + at.states)),
        scores(reinterpret_cast<float*>(memory + at.scores)),
        new_keys(reinterpret_cast<T*>(memory + at.new_keys)),
        new_values(reinterpret_cast<T*>(memory + at.new_values)) {}
};

}  // namespace zinit::cuda
