// Rows of the result that must be computed again. Where the queries of a block see different keys, a hidden
// key has the weight 0 in the products of its tile, and 0 * NaN and 0 * inf are NaN. Slow, and for such
// values alone.
#pragma once
#include "../warp.cuh"
#include "work.cuh"

namespace zinit::cuda {

// One query of a block by one warp, key by key, each key that it sees alone. Lane l holds dimensions l, l +
// 32, ...
template <class T, class Shape>
class RowAgain {
  static constexpr int kOfLane = (Shape::kHeadDim + 31) / 32;

 public:
  __device__ __forceinline__ RowAgain(const PrefillWork& work, const QueryBlock& of, int in_block)
      : w(work), block(of), row(in_block) {
    const int token = block.first + row;
    const T* from = row_of<T>(w.query, block.batch, block.head, block.first_q + token);
    const int position = block.rotary_start + (w.rotary.by_token ? token : 0);
    each([&](int i, int d) { query[i] = to_float(rotated(w, from, d, position)); });
  }

  // acc, relative to the m that the row has.
  __device__ __forceinline__ void attend(float m) {
    const float pivot = m == -INFINITY ? 0.f : m;
    for (int key = block.begin(w, row); key < block.end(w, row); ++key) {
      float bias = 0.f;
      if (w.key_bias.given) bias = key_bias_log2(w, block.batch, key);
      if (bias == -INFINITY) continue;
      const KeyPlace at = block.locate(w, key);
      const T* key_row = row_of<T>(w.key_cache, at.batch, block.kv_head, at.slot);
      const T* value_row = row_of<T>(w.value_cache, at.batch, block.kv_head, at.slot);
      const float p = fast_exp2(cap_exponent(w, dot(key_row) * (w.scale * kLog2E)) + bias - pivot);
      each([&](int i, int d) { acc[i] += p * to_float(value_row[d]); });
    }
  }

  // acc / l, and the prompt branch, to out.
  __device__ __forceinline__ void finish(float inverse, const PromptBranch& branch) {
    each([&](int i, int) { acc[i] *= inverse; });
    if (branch.is_wanted()) {
      const View &keys = w.prompt_key, &values = w.prompt_value;
      const int64_t at_key = branch.table_row * keys.batch + branch.kv_head * keys.head;
      const int64_t at_value = branch.table_row * values.batch + branch.kv_head * values.head;
      with_elements(keys.data, keys.dtype, [&](const auto* elements) {
        float m = -INFINITY, l = 0.f;
        const auto score = [&](int j) {
          return cap_exponent(w, dot(elements + at_key + j * keys.token) * (w.scale * kLog2E));
        };
        for (int j = 0; j < branch.prompts; ++j) m = fmaxf(m, score(j));
        for (int j = 0; j < branch.prompts; ++j) l += fast_exp2(score(j) - m);
        for (int j = 0; j < branch.prompts; ++j) {
          const float p = branch.weight / l * fast_exp2(score(j) - m);
          const auto* value = static_cast<decltype(elements)>(values.data) + at_value + j * values.token;
          each([&](int i, int d) { acc[i] += p * to_float(value[d]); });
        }
      });
    }
    T* to = row_of<T>(w.out, block.batch, block.head, block.first_q + block.first + row);
    each([&](int i, int d) { to[d] = from_float<T>(acc[i]); });
  }

 private:
  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int d = lane_index() + i * 32;
      if (d < Shape::kHeadDim) f(i, d);
    }
  }
  template <class E>
  __device__ __forceinline__ float dot(const E* key) {
    float sum = 0.f;
    each([&](int i, int d) { sum += query[i] * to_float(key[d]); });
    return warp_sum(sum);
  }

  const PrefillWork& w;
  const QueryBlock& block;
  const int row;
  float query[kOfLane] = {}, acc[kOfLane] = {};
};

}  // namespace zinit::cuda
