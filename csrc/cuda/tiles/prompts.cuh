// The gated prompt branch of a tile of queries: a softmax of its own, added to what the rows have.
#pragma once
#include "../prompt_table.cuh"
#include "../softcap.cuh"
#include "softmax.cuh"

namespace zinit::cuda {

// The prompts that a head of a sequence sees.
struct PromptBranch {
  int table_row, kv_head, prompts;
  float weight;     // act(gate)
  bool in_vectors;  // the tables have the query's dtype and aligned rows

  __device__ PromptBranch(const AttentionParams& w, int sequence, int head, int head_kv, bool vectors)
      : table_row(prompt_row(w, sequence)),
        kv_head(head_kv),
        prompts(table_row < 0 ? 0 : static_cast<int>(w.prompt_length)),
        weight(prompts ? prompt_weight(w, table_row, head) : 0.f),
        in_vectors(vectors) {}
  __device__ bool is_wanted() const { return weight != 0.f; }  // at gate 0 all bits are plain attention's
};

// Prompts first .. first + kKeys of the branch into a tile of keys and one of values, zeros behind the last;
// there after the wait for this thread's copies and a barrier.
template <class T, class Shape>
__device__ __forceinline__ void stage_prompts(const AttentionParams& w, const PromptBranch& branch, int first,
                                              T* keys, T* values) {
  const int count = min(branch.prompts - first, Shape::kKeys);
  each_vector<Shape>((count + 15) / 16 * 16, [&](int row, int d) {
    const bool wanted = row < count;
    const int prompt = first + (wanted ? row : 0);
    const auto stage = [&](const View& table, T* to) {
      if (branch.in_vectors) {
        return copy_async(to, row_of<T>(table, branch.table_row, branch.kv_head, prompt) + d, wanted);
      }
      const int64_t at = branch.table_row * table.batch + branch.kv_head * table.head + prompt * table.token;
      with_elements(table.data, table.dtype, [&](const auto* elements) {
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = from_float<T>(wanted ? to_float(elements[at + d + i]) : 0.f);
      });
    };
    stage(w.prompt_key, keys + row * Shape::kStride + d);
    stage(w.prompt_value, values + row * Shape::kStride + d);
  });
}

// Scaled scores of 16 prompts, of which the first `count` are there.
template <class T, class Shape>
__device__ __forceinline__ void score_prompts(const AttentionParams& w,
                                              float (&scores)[Shape::kRowTiles][2][4], const T* queries,
                                              const T* keys, int count) {
  multiply_keys<T, Shape>(scores, queries, keys);
  float scale = w.scale * kLog2E;
  if (w.softcap > 0.f) cap_tile(scores, scale, w.softcap), scale = 1.f;
  each_result<Shape, 2>([&](int t, int n, int i) {
    const bool exists = n * 8 + lane_index() % 4 * 2 + i % 2 < count;
    scores[t][n][i] = exists ? scores[t][n][i] * scale : -INFINITY;
  });
}

// out += weight * softmax(scale * q pk^T) pv. The first tile of prompts is staged and visible to all. The
// scores are computed twice, for their sum and for their weights: those of 128 prompts would not fit into
// registers.
template <class T, class Shape>
__device__ __forceinline__ void add_prompts(const AttentionParams& w, const PromptBranch& branch,
                                            const T* queries, T* keys, T* values,
                                            typename Shape::Output& out) {
  const auto restage = [&](int first) {
    __syncthreads();
    stage_prompts<T, Shape>(w, branch, first, keys, values);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
  };
  float scores[Shape::kRowTiles][2][4];
  Softmax<Shape> softmax;
  for (int first = 0; first < branch.prompts; first += Shape::kKeys) {
    if (first > 0) restage(first);
    const int count = min(branch.prompts - first, Shape::kKeys);
    for (int j = 0; j < count; j += 16) {
      typename Shape::Rows unused;
      score_prompts<T, Shape>(w, scores, queries, keys + j * Shape::kStride, count - j);
      softmax.add(scores, 1.f, unused);
    }
  }
  typename Shape::Rows weights;
#pragma unroll
  for (int t = 0; t < Shape::kRowTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) weights[t][half] = branch.weight / row_sum(softmax.l[t][half]);
  }
  const int last = (branch.prompts - 1) / Shape::kKeys * Shape::kKeys;
  for (int first = last; first >= 0; first -= Shape::kKeys) {  // from the one that is still there
    if (first < last) restage(first);
    const int count = min(branch.prompts - first, Shape::kKeys);
    for (int j = 0; j < count; j += 16) {
      score_prompts<T, Shape>(w, scores, queries, keys + j * Shape::kStride, count - j);
      each_result<Shape, 2>([&](int t, int n, int i) {
        scores[t][n][i] = weights[t][i / 2] * fast_exp2(scores[t][n][i] - softmax.m[t][i / 2]);
      });
      add_values<T, Shape>(out, scores, values + j * Shape::kStride);
    }
  }
}

// Whether rows of the prompt tables can be copied as they are.
inline bool prompts_in_vectors(const AttentionParams& p, DType dtype) {
  const auto aligned = [&](const View& table) {
    const bool rows = table.batch % 8 == 0 && table.head % 8 == 0 && table.token % 8 == 0;
    return table.dtype == dtype && rows && reinterpret_cast<uintptr_t>(table.data) % 16 == 0;
  };
  return aligned(p.prompt_key) && aligned(p.prompt_value);
}

}  // namespace zinit::cuda
