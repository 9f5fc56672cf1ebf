// Attention of many queries: one block owns some queries of a head and walks over the keys that they see; the
// prompts are the last tile, of a softmax of their own.
#pragma once
#include "stage.cuh"

namespace zinit::cuda {

// Scores times `scale`, with the bias, and -inf where a query does not see a key.
template <class Shape, int COLUMNS>
__device__ __forceinline__ void mask_scores(const PrefillWork& w, const QueryBlock& block, int first,
                                            float scale, float (&scores)[Shape::kRowTiles][COLUMNS][4]) {
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of_result<Shape>(m, half), begin = block.begin(w, row), end = block.end(w, row);
#pragma unroll
      for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = first + n * 8 + lane_index() % 4 * 2 + i;
          float score = -INFINITY;
          if (key >= begin && key < end) {
            score = scores[m][n][half * 2 + i] * scale;
            if (w.key_bias) score += w.key_bias[block.batch * w.seqlen_k + key] * kLog2E;
          }
          scores[m][n][half * 2 + i] = score;
        }
      }
    }
  }
}

// Two blocks on a multiprocessor: while one waits for its softmax, the other's products are computed.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2) prefill_attention(const PrefillWork w) {
  using Shape = PrefillShape<D>;
  DYNAMIC_SHARED(memory);
  const PrefillShared<T, Shape> shared(memory);
  const QueryBlock block = QueryBlock::of_block(w, Shape::kQueries);
  if (block.is_empty()) return;
  const PromptBranch branch(w, block.sequence, block.head, block.kv_head, w.prompt_vectors);

  const int begin = block.begin(w, 0), end = block.end(w, block.count - 1);
  const int tiles = max(end - begin + Shape::kKeys - 1, 0) / Shape::kKeys;
  const int seen_by_all_from = block.begin(w, block.count - 1), seen_by_all_to = block.end(w, 0);
  const auto stage = [&](int tile) {
    if (tile < tiles) {
      stage_keys<T, Shape>(w, block, begin + tile * Shape::kKeys, end, shared.keys(tile),
                           shared.values(tile));
    } else if (branch.is_wanted()) {
      stage_prompts<T, Shape>(w, branch, 0, shared.keys(tile), shared.values(tile));
    }
    commit_copies();
  };
  stage_queries<T, Shape>(w, block, shared.queries);
  stage(0);

  const float scale = w.scale * kLog2E;
  typename Shape::Output out = {};
  Softmax<Shape> softmax;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();  // this tile is there, and the one before is done with
    stage(tile + 1);
    const int first = begin + tile * Shape::kKeys;
    float scores[Shape::kRowTiles][Shape::kKeys / 8][4];
    multiply_keys<T, Shape>(scores, shared.queries, shared.keys(tile));
    // the scale is part of the exponent's multiplication where nothing else has to be done to the scores
    const bool whole =
        first >= seen_by_all_from && first + Shape::kKeys <= seen_by_all_to && !w.key_bias && scale >= 0.f;
    if (!whole) mask_scores<Shape>(w, block, first, scale, scores);
    typename Shape::Rows correction;
    softmax.add(scores, whole ? scale : 1.f, correction);
    multiply_rows<Shape>(out, correction);
    add_values<T, Shape>(out, scores, shared.values(tile));
  }
  wait_for_copies<0>();
  __syncthreads();

  typename Shape::Rows inverse;
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(softmax.sum[m][half]);
      inverse[m][half] = sum == 0.f ? 0.f : 1.f / sum;
      const int row = row_of_result<Shape>(m, half);
      if (lane_index() % 4 == 0 && row < block.count) {
        const int64_t head = static_cast<int64_t>(block.batch) * w.num_heads_q + block.head;
        w.lse[head * w.total_q + block.first_q + block.first + row] =
            sum == 0.f ? -INFINITY : softmax.largest[m][half] * kLn2 + logf(sum);
      }
    }
  }
  multiply_rows<Shape>(out, inverse);
  if (branch.is_wanted()) {
    add_prompts<T, Shape>(w, branch, shared.queries, shared.keys(tiles), shared.values(tiles), out);
  }
  write_rows<false, T, Shape>(out, shared.queries, block.count, [&](int row) {
    return row_of<T>(w.out, block.batch, block.head, block.first_q + block.first + row);
  });
}

}  // namespace zinit::cuda
