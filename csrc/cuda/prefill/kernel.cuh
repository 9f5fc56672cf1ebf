// Attention of many queries: one block owns some queries of a head and walks over the keys that they see. The
// prompts are the last tile, with a softmax of their own. The letters m, l, acc, p and alpha are those of
// tiles/softmax.cuh.
#pragma once
#include "../row_end.cuh"
#include "repeat.cuh"
#include "stage.cuh"

namespace zinit::cuda {

// Scores times `scale`, with the bias, and -inf where a query does not see a key.
template <class Shape, int COLUMNS>
__device__ __forceinline__ void mask_scores(const PrefillWork& w, const QueryBlock& block, int first,
                                            float scale, float (&scores)[Shape::kRowTiles][COLUMNS][4]) {
#pragma unroll
  for (int t = 0; t < Shape::kRowTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of_result<Shape>(t, half), begin = block.begin(w, row), end = block.end(w, row);
#pragma unroll
      for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = first + n * 8 + lane_index() % 4 * 2 + i;
          float score = -INFINITY;
          if (key >= begin && key < end) {
            score = scores[t][n][half * 2 + i] * scale;
            if (w.key_bias.given) score += key_bias_log2(w, block.batch, key);
          }
          scores[t][n][half * 2 + i] = score;
        }
      }
    }
  }
}

// Two blocks on a multiprocessor: while one is in its softmax, the tensor cores work for the other.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2) zinit_prefill(const PrefillWork w) {
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

  const float scale = w.softcap > 0.f ? 1.f : w.scale * kLog2E;  // of a tile's scores, capped or not
  typename Shape::Output acc = {};
  Softmax<Shape> softmax;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();  // this tile has landed, and nobody needs the one before
    stage(tile + 1);
    const int first = begin + tile * Shape::kKeys;
    float scores[Shape::kRowTiles][Shape::kKeys / 8][4];
    multiply_keys<T, Shape>(scores, shared.queries, shared.keys(tile));
    if (w.softcap > 0.f) cap_tile(scores, w.scale * kLog2E, w.softcap);
    // where nothing else has to be done to the scores, the scale is part of the exponent's multiply-add
    const bool whole = first >= seen_by_all_from && first + Shape::kKeys <= seen_by_all_to &&
                       !w.key_bias.given && scale >= 0.f;
    if (!whole) mask_scores<Shape>(w, block, first, scale, scores);
    typename Shape::Rows alpha;
    softmax.add(scores, whole ? scale : 1.f, alpha);
    multiply_rows<Shape>(acc, alpha);
    add_values<T, Shape>(acc, scores, shared.values(tile));
  }
  wait_for_copies<0>();
  __syncthreads();

  typename Shape::Rows inverse;
#pragma unroll
  for (int t = 0; t < Shape::kRowTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowEnd end = end_row(w, block.head, softmax.m[t][half], row_sum(softmax.l[t][half]));
      inverse[t][half] = end.factor;
      const int row = row_of_result<Shape>(t, half);
      if (lane_index() % 4 == 0 && row < block.count) {
        const int64_t head = static_cast<int64_t>(block.batch) * w.num_heads_q + block.head;
        w.lse[head * w.total_q + block.first_q + block.first + row] = end.lse;
      }
    }
  }
  multiply_rows<Shape>(acc, inverse);
  if (branch.is_wanted()) {
    add_prompts<T, Shape>(w, branch, shared.queries, shared.keys(tiles), shared.values(tiles), acc);
  }
  write_rows<false, T, Shape>(acc, shared.queries, block.count, [&](int row) {
    return row_of<T>(w.out, block.batch, block.head, block.first_q + block.first + row);
  });
  if (begin == seen_by_all_from && end == seen_by_all_to) return;  // all queries see the same keys
#pragma unroll
  for (int t = 0; t < Shape::kRowTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float special = 0.f;
#pragma unroll
      for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
        if (!is_finite(acc[t][n][half * 2]) || !is_finite(acc[t][n][half * 2 + 1])) special = 1.f;
      }
      special = row_max(special);
      for (int lane = 0; lane < 32; lane += 4) {  // each of them has a row
        if (__shfl_sync(kAllLanes, special, lane) == 0.f) continue;
        const int row = warp_index() * Shape::kWarpRows + t * 16 + half * 8 + lane / 4;
        const float m = __shfl_sync(kAllLanes, softmax.m[t][half], lane);
        const float scale_of_row = __shfl_sync(kAllLanes, inverse[t][half], lane);
        if (row >= block.count) continue;
        __syncwarp();  // the row that is written again has been written
        RowAgain<T, Shape> again(w, block, row);
        again.attend(m);
        again.finish(scale_of_row, branch);
      }
    }
  }
}

}  // namespace zinit::cuda
