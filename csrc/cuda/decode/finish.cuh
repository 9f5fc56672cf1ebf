// The end of a query row: acc divided by l, the gated prompt term added exactly once.
#pragma once
#include "../prompt_table.cuh"
#include "../row_end.cuh"
#include "../softcap.cuh"
#include "../warp.cuh"
#include "work.cuh"

namespace zinit::cuda {

// Sum over i of p[i] * column[i * stride]. All loads of a batch are issued before any is used, and indices
// past the end load the last element again: ptxas serialised the loads of a loop that was only unrolled.
template <class E>
__device__ __forceinline__ float weighted_sum(const float* p, const E* column, int64_t stride, int count) {
  constexpr int kBatch = 16;
  float sum = 0.f;
  for (int first = 0; first < count; first += kBatch) {
    E elements[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) elements[i] = column[min(first + i, count - 1) * stride];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < count) sum += p[first + i] * to_float(elements[i]);
    }
  }
  return sum;
}

// shared.scores[row][j] = act(gate) * softmax_j(scale * q . pk), of the rows whose head takes prompts. The
// queries are visible to all threads.
template <class T>
__device__ __forceinline__ void weigh_prompts(const DecodeWork& w, int sequence, int kv_head, int first,
                                              int count, const Shared<T>& shared) {
  const int table_row = prompt_row(w, sequence);
  if (table_row < 0) return;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const auto prompts = static_cast<int>(w.prompt_length);
  const int64_t table = table_row * w.prompt_key.batch + kv_head * w.prompt_key.head;
  const auto head_of = [&](int row) { return kv_head * w.group + (first + row) % w.group; };
  with_elements(w.prompt_key.data, w.prompt_key.dtype, [&](const auto* elements) {
    for (int i = warp; i < count * prompts; i += kWarps) {
      const int row = i / prompts, j = i % prompts;
      if (!takes_prompts(w, table_row, head_of(row))) continue;
      const T* query = shared.queries + row * shared.query_stride;
      const auto* key = elements + table + j * w.prompt_key.token;
      float score = 0.f;
#pragma unroll 4
      for (int d = lane; d < w.head_dim; d += 32) score += to_float(query[d]) * to_float(key[d]);
      score = warp_sum(score);
      if (lane == 0) shared.scores[i] = cap_exponent(w, score * (w.scale * kLog2E));
    }
  });
  __syncthreads();
  for (int row = warp; row < count; row += kWarps) {
    if (!takes_prompts(w, table_row, head_of(row))) continue;
    float* scores = shared.scores + row * prompts;
    float m = -INFINITY, l = 0.f;
    for (int j = lane; j < prompts; j += 32) m = fmaxf(m, scores[j]);
    m = warp_max(m);
    for (int j = lane; j < prompts; j += 32) l += fast_exp2(scores[j] - m);
    l = warp_sum(l);
    const float weight = prompt_weight(w, table_row, head_of(row)) / l;
    for (int j = lane; j < prompts; j += 32) scores[j] = weight * fast_exp2(scores[j] - m);
  }
  __syncthreads();
}

constexpr int kDimsOfThread = 256 / kThreads;  // of a row, at most

// f(i, d) for each dimension d of a row that is this thread's.
template <class F>
__device__ __forceinline__ void each_dim(int64_t head_dim, const F& f) {
#pragma unroll
  for (int i = 0; i < kDimsOfThread; ++i) {
    const int d = static_cast<int>(threadIdx.x) + i * kThreads;
    if (d < head_dim) f(i, d);
  }
}

// The gated prompt term of a query row, from its weighed prompts; 0 where its head takes none.
template <class T>
__device__ __forceinline__ void sum_prompts(const DecodeWork& w, int sequence, int kv_head, int row,
                                            const float* weights, float (&sums)[kDimsOfThread]) {
  each_dim(w.head_dim, [&](int i, int) { sums[i] = 0.f; });
  const int table_row = prompt_row(w, sequence);
  if (table_row < 0 || !takes_prompts(w, table_row, kv_head * w.group + row % w.group)) return;
  const int64_t table = table_row * w.prompt_value.batch + kv_head * w.prompt_value.head;
  with_elements(w.prompt_value.data, w.prompt_value.dtype, [&](const auto* elements) {
    each_dim(w.head_dim, [&](int i, int d) {
      sums[i] = weighted_sum(weights, elements + table + d, w.prompt_value.token,
                             static_cast<int>(w.prompt_length));
    });
  });
}

// acc / l and the prompt term to out, and lse, of a query row whose keys are all in m and l.
template <class T>
__device__ __forceinline__ void finish_row(const DecodeWork& w, int sequence, int kv_head, int row, float m,
                                           float l, const float (&acc)[kDimsOfThread],
                                           const float (&prompts)[kDimsOfThread]) {
  const int token = row / w.group, head = kv_head * w.group + row % w.group;
  const RowEnd end = end_row(w, head, m, l);
  T* out = row_of<T>(w.out, sequence, head, token);
  each_dim(w.head_dim, [&](int i, int d) { out[d] = from_float<T>(acc[i] * end.factor + prompts[i]); });
  if (threadIdx.x == 0) w.lse[(sequence * w.num_heads_q + head) * w.seqlen_q + token] = end.lse;
}

// The place of a query row's partial result among all: [B, Hkv, T * group, splits].
__device__ __forceinline__ int64_t partial_index(const DecodeWork& w, int sequence, int kv_head, int row,
                                                 int split) {
  return ((static_cast<int64_t>(sequence) * w.num_heads_kv + kv_head) * w.query_rows + row) * w.splits +
         split;
}

// Computes rows of shared.merged again that are not finite, each with the keys that it sees alone. Where the
// rows of a block see different keys, a hidden one has the weight 0 in the products, and 0 * NaN and 0 * inf
// are NaN. Every warp looks at all of a row, so all take the same branch. Slow, and for such values alone.
template <class T>
__device__ __forceinline__ void repeat_rows(const DecodeWork& w, const Share& share, const Shared<T>& shared,
                                            const float* states) {
  const auto head_dim = static_cast<int>(w.head_dim), lane = static_cast<int>(threadIdx.x) % 32;
  for (int row = 0; row < share.rows; ++row) {
    float* merged = shared.merged + row * shared.merged_stride;
    float special = 0.f;
    for (int d = lane; d < head_dim; d += 32) special = is_finite(merged[d]) ? special : 1.f;
    if (warp_max(special) == 0.f) continue;
    __syncthreads();  // all have looked
    const T* query = shared.queries + row * shared.query_stride;
    const float pivot = states[2 * row] == -INFINITY ? 0.f : states[2 * row];
    const Visible seen = share.visible(w, row);
    float acc[kDimsOfThread] = {};
    for (int key = max(seen.begin, share.begin); key < seen.end; ++key) {
      const CacheRow at = locate(w, share.sequence, key);
      const T* key_row = row_at(w, w.key_cache, share.kv_head, at, shared.new_keys);
      const T* value_row = row_at(w, w.value_cache, share.kv_head, at, shared.new_values);
      float score = 0.f;
      for (int d = lane; d < head_dim; d += 32) score += to_float(query[d]) * to_float(key_row[d]);
      const float p = fast_exp2(cap_exponent(w, __fmul_rn(warp_sum(score), w.scale * kLog2E)) - pivot);
      each_dim(head_dim, [&](int i, int d) { acc[i] += p * to_float(value_row[d]); });
    }
    each_dim(head_dim, [&](int i, int d) { merged[d] = acc[i]; });
    __syncthreads();
  }
}

// The results of the warps of a block become one. Each warp has left its states (m and l of every row) in
// shared memory. `each_vector(factor_of, add)` calls add(row, d, factor_of(row), four values) for the parts
// of acc that a lane holds. The warps add in turns, in the order of the keys, so the result has the same bits
// every time.
template <class T, int ROWS, class EachVector>
__device__ __forceinline__ void merge_and_finish(const DecodeWork& w, const Share& share,
                                                 const Shared<T>& shared, const EachVector& each_vector) {
  const auto head_dim = static_cast<int>(w.head_dim);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float* merged_states = shared.states + kWarps * ROWS * 2;
  __syncthreads();
  for (int row = static_cast<int>(threadIdx.x); row < ROWS; row += kThreads) {
    float m = -INFINITY, l = 0.f;
    for (int v = 0; v < kWarps; ++v) m = fmaxf(m, shared.states[(v * ROWS + row) * 2]);
    for (int v = 0; v < kWarps; ++v) {
      const float* state = shared.states + (v * ROWS + row) * 2;
      if (state[1] != 0.f) l += state[1] * fast_exp2(state[0] - m);
    }
    merged_states[2 * row] = m;
    merged_states[2 * row + 1] = l;
  }
  __syncthreads();
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn) {
      const auto factor_of = [&](int row) {
        const float m = merged_states[2 * row], own = shared.states[(warp * ROWS + row) * 2];
        return m == -INFINITY ? 0.f : fast_exp2(own - m);
      };
      each_vector(factor_of, [&](int row, int d, float factor, float4 values) {
        float4& to = *reinterpret_cast<float4*>(shared.merged + row * shared.merged_stride + d);
        const float4 sum = turn == 0 ? make_float4(0.f, 0.f, 0.f, 0.f) : to;
        to = make_float4(sum.x + values.x * factor, sum.y + values.y * factor, sum.z + values.z * factor,
                         sum.w + values.w * factor);
      });
    }
    __syncthreads();
  }
  if (w.seqlen_q > 1) repeat_rows(w, share, shared, merged_states);  // one token sees all keys of its share
  const int b = share.sequence.index;
  if (w.splits == 1) {
    weigh_prompts(w, b, share.kv_head, share.first_row, share.rows, shared);
    for (int row = 0; row < share.rows; ++row) {
      float acc[kDimsOfThread], prompts[kDimsOfThread];
      const int query_row = share.first_row + row;
      sum_prompts<T>(w, b, share.kv_head, query_row, shared.scores + row * w.prompt_length, prompts);
      each_dim(head_dim, [&](int i, int d) { acc[i] = shared.merged[row * shared.merged_stride + d]; });
      finish_row<T>(w, b, share.kv_head, query_row, merged_states[2 * row], merged_states[2 * row + 1], acc,
                    prompts);
    }
    return;
  }
  for (int row = 0; row < share.rows; ++row) {
    const int64_t at = partial_index(w, b, share.kv_head, share.first_row + row, share.split);
    for (int d = static_cast<int>(threadIdx.x); d < head_dim; d += kThreads) {
      w.partials[at * head_dim + d] = shared.merged[row * shared.merged_stride + d];
    }
    if (threadIdx.x < 2) w.states[2 * at + threadIdx.x] = merged_states[2 * row + threadIdx.x];
  }
}

}  // namespace zinit::cuda
