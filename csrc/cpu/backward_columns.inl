// The element-wise half of backward: one vector of queries (a column of a score tile) at a time.
#pragma once
#include "kernels.h"
#include "prompt.inl"

namespace zinit::cpu {
namespace {

constexpr int64_t kBackwardKeys = 64;
constexpr int64_t kGroup = 64;  // queries over which gradients of keys are reduced in one product

template <class Tile>
struct BackwardScratch {
  using Unit = typename Tile::Unit;
  int64_t strip_units;
  // The queries of a pass.
  Unit *query, *grad_out;              // [strips][transposed]
  Unit *query_lanes, *grad_out_lanes;  // lanes
  float* grad_query;                   // [block_queries][width]
  float* pivot;                        // what is subtracted from a score of the tile
  float* rest;                         // and then from the exponent of 2
  float* delta;
  // A block of keys, or the prompt rows.
  Unit *key, *value, *key_lanes;                       // rows, rows, lanes
  Unit *prompt_key, *prompt_value, *prompt_key_lanes;  // the same
  float *scores, *grad_scores;                         // [keys][kGroup]
  Unit *weights, *grad_scores_by_query;                // [keys][kGroup / kPack]: reduced along the queries
  Unit* grad_scores_by_key;                            // [keys / kPack][kGroup]: reduced along the keys
  float *grad_key, *grad_value;                        // [keys][padded_dim]
  float* key_sum;  // [2, S, padded_dim] of the first split, then of the one at work; without partials alone
  int64_t bytes;

  BackwardScratch(const BackwardPlan& p, void* memory) {
    const int64_t width = round_up(p.head_dim, kLanes), P = round_up(p.prompt_length, 2);
    const int64_t rows = max(kBackwardKeys, P), queries = round_up(p.block_queries, kStrip);
    strip_units = round_up(width, Tile::kPack * kLanes) / Tile::kPack * kStrip;
    Arena arena{static_cast<char*>(memory)};
    query = arena.take<Unit>(queries / kStrip * strip_units);
    grad_out = arena.take<Unit>(queries / kStrip * strip_units);
    query_lanes = arena.take<Unit>(queries / Tile::kPack * width);
    grad_out_lanes = arena.take<Unit>(queries / Tile::kPack * width);
    grad_query = arena.take<float>(queries * width);
    pivot = arena.take<float>(queries);
    rest = arena.take<float>(queries);
    delta = arena.take<float>(queries);
    const auto packed = [&](int64_t count) { return arena.take<Unit>(count / Tile::kPack * width); };
    key = packed(kBackwardKeys);
    value = packed(kBackwardKeys);
    key_lanes = Tile::kPack == 1 ? key : packed(kBackwardKeys);
    prompt_key = packed(P);
    prompt_value = packed(P);
    prompt_key_lanes = Tile::kPack == 1 ? prompt_key : packed(P);
    scores = arena.take<float>(rows * kGroup);
    grad_scores = arena.take<float>(rows * kGroup);
    if constexpr (Tile::kPack == 1) {
      weights = scores, grad_scores_by_query = grad_scores_by_key = grad_scores;
    } else {
      weights = arena.take<Unit>(rows * kGroup / Tile::kPack);
      grad_scores_by_query = arena.take<Unit>(rows * kGroup / Tile::kPack);
      grad_scores_by_key = arena.take<Unit>(rows / Tile::kPack * kGroup);
    }
    grad_key = arena.take<float>(kBackwardKeys * p.padded_dim);
    grad_value = arena.take<float>(kBackwardKeys * p.padded_dim);
    const bool sums =
        p.key_partials == nullptr && p.wants_keys() && (p.num_heads_q != p.num_heads_kv || p.blocks > 1);
    key_sum = arena.take<float>(sums ? min(p.splits, 2) * 2 * p.seqlen_k * p.padded_dim : 0);
    bytes = arena.used;
  }

  // Rows j and j + 1 of one column.
  void store_weights(int64_t j, int64_t column, Vec even, Vec odd) const {
    if constexpr (Tile::kPack == 1) {
      store(weights + j * kGroup + column, even);
      store(weights + (j + 1) * kGroup + column, odd);
    } else {
      Tile::store_query_pairs(weights + (j * kGroup + column) / 2, even);
      Tile::store_query_pairs(weights + ((j + 1) * kGroup + column) / 2, odd);
    }
  }
  void store_grad_scores(int64_t j, int64_t column, Vec even, Vec odd) const {
    if constexpr (Tile::kPack == 1) {
      store(grad_scores + j * kGroup + column, even);
      store(grad_scores + (j + 1) * kGroup + column, odd);
    } else {
      Tile::store_query_pairs(grad_scores_by_query + (j * kGroup + column) / 2, even);
      Tile::store_query_pairs(grad_scores_by_query + ((j + 1) * kGroup + column) / 2, odd);
      Tile::store_key_pair(grad_scores_by_key + j / 2 * kGroup + column, even, odd);
    }
  }
};

// sum_d a[d] b[d] of two rows of the same type.
template <class T>
inline float dot(const T* a, const T* b, int64_t D) {
  Vec sum = broadcast(0.f);
  for (int64_t d = 0; d < D; d += kLanes) sum = fma(load_columns(a, d, D), load_columns(b, d, D), sum);
  return reduce_add(sum);
}

template <class T>
inline void prefetch_row(const T* row, int64_t D) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(row + d);
}

// pivot, rest and the part of delta that is not the prompt's, for the queries of a pass; neutral beyond them.
// Whether some lse is too coarse to take them from.
template <class Tile>
inline bool row_statistics(const BackwardPlan& p, const Sequence& sequence, const ScoreScale& how,
                           int64_t head, int64_t first, int64_t queries, const BackwardScratch<Tile>& s) {
  constexpr int64_t kAhead = 8;      // rows
  constexpr float kNothing = 1e30f;  // as a rest: every weight of the row is 0
  const int64_t index = sequence.lse_index(p.num_heads_q, head, first);
  const double scale = static_cast<double>(how.remaining);
  bool coarse = false;
  visit_rows(sequence.query_row(p.grad_out, head, first), p.grad_out.token, p.grad_out.dtype,
             [&](auto grad_rows) {
               auto out_rows = grad_rows;
               out_rows.data = static_cast<decltype(out_rows.data)>(sequence.query_row(p.out, head, first));
               out_rows.stride = p.out.token;
               for (int64_t i = 0; i < queries; ++i) {
                 // Rows of out lie a page or more apart where it is token-major: without this 1 to 2 % of
                 // backward waits.
                 if (i + kAhead < queries) {
                   prefetch_row(out_rows[i + kAhead], p.head_dim);
                   prefetch_row(grad_rows[i + kAhead], p.head_dim);
                 }
                 const float lse = p.lse[index + i];
                 if (lse == -kInfinity) {
                   s.pivot[i] = 0.f, s.rest[i] = kNothing;
                 } else {
                   const double score = static_cast<double>(lse) / scale;
                   s.pivot[i] = __builtin_fabs(score) < 1e30 ? static_cast<float>(score) : 0.f;
                   s.rest[i] = static_cast<float>(
                       (static_cast<double>(lse) - static_cast<double>(s.pivot[i]) * scale) / kLn2);
                   coarse |= __builtin_fabsf(lse) > kCoarse;
                 }
                 s.delta[i] =
                     dot(grad_rows[i], out_rows[i], p.head_dim) - (p.grad_lse ? p.grad_lse[index + i] : 0.f);
               }
             });
  for (int64_t i = queries; i < round_up(queries, kStrip); ++i) {
    s.pivot[i] = 0.f, s.rest[i] = kNothing, s.delta[i] = 0.f;
  }
  return coarse;
}

// Scores (masked) and dO v^T of one column -> weights and score gradients, zero outside the extent.
template <class Tile>
inline void token_gradient_column(const Extent& e, int64_t keys, const ScoreScale& how, int64_t row,
                                  int64_t column, bool wants_scores, const BackwardScratch<Tile>& s) {
  const float* scores = s.scores + column;
  const float* grads = s.grad_scores + column;
  const Vec pivot = load(s.pivot + row + column), rest = load(s.rest + row + column);
  const Vec delta = load(s.delta + row + column), zero = broadcast(0.f), minus_rest = zero - rest;
  const Vec factor = broadcast(how.factor);
  const auto weight = [&](int64_t j, bool masked) {
    const Vec x = fma(load(scores + j * kGroup) - pivot, factor, minus_rest);
    return masked ? exp2_clamped(x) : exp2(x);
  };
  const auto rows = [&](int64_t begin, int64_t end, bool masked) {
    int64_t j = begin;
    for (; j + 2 <= end; j += 2) {
      const Vec even = weight(j, masked), odd = weight(j + 1, masked);
      if (wants_scores) {
        const Vec ds_even = even * (load(grads + j * kGroup) - delta);
        const Vec ds_odd = odd * (load(grads + (j + 1) * kGroup) - delta);
        s.store_grad_scores(j, column, ds_even, ds_odd);
      }
      s.store_weights(j, column, even, odd);
    }
    if constexpr (Tile::kPack == 1) {
      if (j < end) {
        const Vec last = weight(j, masked);
        if (wants_scores)
          store(s.grad_scores + j * kGroup + column, last * (load(grads + j * kGroup) - delta));
        store(s.weights + j * kGroup + column, last);
      }
    }
  };
  const auto clear = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += 2) {
      if (Tile::kPack == 1 && j + 1 == end) {
        store(s.scores + j * kGroup + column, zero);
        store(s.grad_scores + j * kGroup + column, zero);
        break;
      }
      if (wants_scores) s.store_grad_scores(j, column, zero, zero);
      s.store_weights(j, column, zero, zero);
    }
  };
  const int64_t full_begin = round_up(e.full_begin, Tile::kPack),
                full_end = e.full_end - e.full_end % Tile::kPack;
  clear(0, e.begin);
  if (how.biased || full_begin >= full_end) {
    rows(e.begin, e.end, true);
  } else {
    rows(e.begin, full_begin, true);
    rows(full_begin, full_end, false);
    rows(full_end, e.end, true);
  }
  clear(e.end, keys);
}

// Scores and dO pv^T of one column of the prompt tile -> gated weights and score gradients; delta loses s r.
// Returns r, by lane.
template <class Tile>
inline Vec prompt_gradient_column(int64_t P, float scale, float gate, int64_t column, float* delta,
                                  const BackwardScratch<Tile>& s) {
  float* scores = s.scores + column;
  const float* grads = s.grad_scores + column;
  prompt_softmax_column(P, scale, scores, kGroup);
  Vec r = broadcast(0.f);
  for (int64_t j = 0; j < P; ++j) r = fma(load(scores + j * kGroup), load(grads + j * kGroup), r);
  if (gate == 0.f) return r;
  const Vec gates = broadcast(gate);
  store(delta + column, load(delta + column) - gates * r);
  const auto weight = [&](int64_t j) { return j < P ? load(scores + j * kGroup) * gates : broadcast(0.f); };
  const auto grad = [&](int64_t j) { return j < P ? load(grads + j * kGroup) - r : broadcast(0.f); };
  for (int64_t j = 0; j < P; j += 2) {
    const Vec even = weight(j), odd = weight(j + 1);
    s.store_grad_scores(j, column, even * grad(j), odd * grad(j + 1));
    s.store_weights(j, column, even, odd);
  }
  return r;
}

}  // namespace
}  // namespace zinit::cpu
