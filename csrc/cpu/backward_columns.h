// The element-wise half of backward: one vector of queries (a column of a score tile) at a time.
#pragma once
#include "prompt.h"
#include "sequence.h"
#include "softmax.h"
#include "strip.h"
#include "work.h"

namespace zinit::cpu {
namespace {

constexpr int64_t kBackwardKeys = 64;
constexpr int64_t kGroup = 64;     // queries over which gradients of keys are reduced in one product
constexpr float kNothing = 1e30f;  // as the rest of a row: every p is 0

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
  float *scores, *dp;                                  // [keys][kGroup]
  float* slopes;                                       // the same, of the soft cap; only with one
  Unit *p, *ds_by_query;                               // [keys][kGroup / kPack]: reduced along the queries
  Unit* ds_by_key;                                     // [keys / kPack][kGroup]: reduced along the keys
  float *grad_key, *grad_value;                        // [keys][padded_dim]
  float* key_sum;  // [2, S, padded_dim] of the first split, then of the one at work; only without partials
  int64_t bytes;

  BackwardScratch(const BackwardWork& w, void* memory) {
    const int64_t width = round_up(w.head_dim, kLanes), P = round_up(w.prompt_length, 2);
    const int64_t rows = max(kBackwardKeys, P), queries = round_up(w.block_queries, kStrip);
    strip_units = round_up(width, Tile::kPack * kLanes) / Tile::kPack * kStrip;
    Arena arena{static_cast<char*>(memory)};
    // First, because it stays where it is when a split is repeated with another tile.
    const bool sums =
        w.wants_keys() && !w.stores_partials() && (w.num_heads_q != w.num_heads_kv || w.blocks > 1);
    key_sum = arena.take<float>(sums ? min(w.splits, 2) * 2 * w.seqlen_k * w.padded_dim : 0);
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
    dp = arena.take<float>(rows * kGroup);
    slopes = arena.take<float>(w.softcap > 0.f ? rows * kGroup : 0);
    if constexpr (Tile::kPack == 1) {
      p = scores, ds_by_query = ds_by_key = dp;
    } else {
      p = arena.take<Unit>(rows * kGroup / Tile::kPack);
      ds_by_query = arena.take<Unit>(rows * kGroup / Tile::kPack);
      ds_by_key = arena.take<Unit>(rows / Tile::kPack * kGroup);
    }
    grad_key = arena.take<float>(kBackwardKeys * w.padded_dim);
    grad_value = arena.take<float>(kBackwardKeys * w.padded_dim);
    bytes = arena.used;
  }

  // Rows j and j + 1 of one column.
  void store_p(int64_t j, int64_t column, Vec even, Vec odd) const { store_rows(p, j, column, even, odd); }
  void store_ds(int64_t j, int64_t column, Vec even, Vec odd) const {
    store_rows(ds_by_query, j, column, even, odd);
    if constexpr (Tile::kPack > 1) Tile::store_key_pair(ds_by_key + j / 2 * kGroup + column, even, odd);
  }

 private:
  void store_rows(Unit* tile, int64_t j, int64_t column, Vec even, Vec odd) const {
    if constexpr (Tile::kPack == 1) {
      store(tile + j * kGroup + column, even);
      store(tile + (j + 1) * kGroup + column, odd);
    } else {
      Tile::store_query_pairs(tile + (j * kGroup + column) / 2, even);
      Tile::store_query_pairs(tile + ((j + 1) * kGroup + column) / 2, odd);
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

// What is subtracted from a score of the tile, for a row with that log-sum-exp.
inline float pivot_of(double lse, double scale) {
  const double score = lse / scale;
  return __builtin_fabs(score) < 1e30 ? static_cast<float>(score) : 0.f;
}

// pivot, rest and the part of delta that is not the prompt's, for the queries of a pass; neutral beyond them.
// Returns whether some lse is too coarse to take them from.
template <class Tile>
inline bool row_statistics(const BackwardWork& w, const Sequence& sequence, const ScoreScale& how,
                           int64_t head, int64_t first, int64_t queries, const BackwardScratch<Tile>& s) {
  constexpr int64_t kAhead = 8;  // rows
  const int64_t index = sequence.lse_index(w.num_heads_q, head, first);
  const double scale = static_cast<double>(how.remaining);
  bool coarse = false;
  visit_rows(sequence.query_row(w.grad_out, head, first), w.grad_out.token, w.grad_out.dtype,
             [&]<class T>(Rows<T> grad_rows) {
               const Rows<T> out_rows{static_cast<T*>(sequence.query_row(w.out, head, first)), w.out.token};
               for (int64_t i = 0; i < queries; ++i) {
                 // Rows of out lie a page or more apart where it is token-major. Without prefetching them 1
                 // to 2 % of backward is waiting.
                 if (i + kAhead < queries) {
                   prefetch_row(out_rows[i + kAhead], w.head_dim);
                   prefetch_row(grad_rows[i + kAhead], w.head_dim);
                 }
                 const float lse = w.lse[index + i];
                 if (lse == -kInfinity) {
                   s.pivot[i] = 0.f, s.rest[i] = kNothing;
                 } else {
                   s.pivot[i] = pivot_of(static_cast<double>(lse), scale);
                   s.rest[i] = static_cast<float>(
                       (static_cast<double>(lse) - static_cast<double>(s.pivot[i]) * scale) / kLn2);
                   coarse |= __builtin_fabsf(lse) > kCoarse;
                 }
                 s.delta[i] = dot(grad_rows[i], out_rows[i], w.head_dim) -
                              (w.grad_lse.given ? w.grad_lse.data[index + i] : 0.f);
               }
             });
  for (int64_t i = queries; i < round_up(queries, kStrip); ++i) {
    s.pivot[i] = 0.f, s.rest[i] = kNothing, s.delta[i] = 0.f;
  }
  return coarse;
}

// The gradient of a head's sink by the queries of a pass, after delta is complete. The sink's value is 0, so its
// dS is -p delta.
template <class Tile>
inline float sink_gradient(const ScoreScale& how, float sink, const float* lse, int64_t queries,
                           const BackwardScratch<Tile>& s) {
  // A sink of 1e25 that is larger than all scores leaves nothing to the keys. Its rest is a rounding error then; where
  // there is more in the sum, rest is the logarithm of a small number.
  constexpr float kAlone = 1e25f, kLargestRest = 64.f;
  double sum = 0;
  for (int64_t i = 0; i < queries; ++i) {
    if (lse[i] == -kInfinity || sink == -kInfinity) continue;
    const double m = static_cast<double>(s.pivot[i]) * static_cast<double>(how.remaining);
    const double exponent = (static_cast<double>(sink) - m) / kLn2 - static_cast<double>(s.rest[i]);
    const bool alone =
        lse[i] == sink && __builtin_fabsf(sink) > kAlone && __builtin_fabsf(s.rest[i]) > kLargestRest;
    const double p = alone ? 1. : __builtin_exp2(exponent);
    sum -= p * static_cast<double>(s.delta[i]);
  }
  return static_cast<float>(sum);
}

// Scores (masked) and dO v^T of one column -> p and ds, 0 outside the extent.
template <class Tile>
[[gnu::always_inline]] inline void token_gradient_column(const Extent& e, int64_t keys, const ScoreScale& how,
                                                         int64_t row, int64_t column, bool wants_scores,
                                                         bool careful, const BackwardScratch<Tile>& s) {
  float* scores = s.scores + column;
  float* dp = s.dp + column;
  const Vec pivot = load(s.pivot + row + column), rest = load(s.rest + row + column);
  Vec delta = load(s.delta + row + column);
  const Vec zero = broadcast(0.f), minus_rest = zero - rest;
  const Vec factor = broadcast(how.factor), nothing = broadcast(-kInfinity);
  const Vec absent = broadcast(kNothing);
  if (how.cap > 0.f) {
    // An infinite key has finite scores under a cap. In a lane without a query, though, its score is 0 * inf.
    for (int64_t j = e.begin; j < e.end; ++j) {
      store(scores + j * kGroup, select_ge(rest, absent, nothing, load(scores + j * kGroup)));
      if (!wants_scores) continue;
      const Vec ds = (load(dp + j * kGroup) - delta) * load(s.slopes + column + j * kGroup);
      store(dp + j * kGroup, select_ge(rest, absent, zero, ds));
    }
    delta = zero;
  }
  struct Pair {
    Vec p, ds;
  };
  const auto gradient = [&](int64_t j, bool masked) __attribute__((always_inline)) -> Pair {
    const Vec score = load(scores + j * kGroup), x = fma(score - pivot, factor, minus_rest);
    Vec p = masked ? exp2_clamped(x) : exp2(x);
    Vec ds = wants_scores ? p * (load(dp + j * kGroup) - delta) : zero;
    if (careful) {  // a key that the query does not see: its value may be NaN, and so may the query's lse
      p = select_ge(nothing, score, zero, p);
      ds = select_ge(nothing, score, zero, ds);
      // a lane without a query, whose score of an infinite key is 0 * inf: in packed pairs it would reach the key
      p = select_ge(rest, absent, zero, p);
      ds = select_ge(rest, absent, zero, ds);
    }
    return {p, ds};
  };
  const auto rows = [&](int64_t begin, int64_t end, bool masked) __attribute__((always_inline)) {
    int64_t j = begin;
    for (; j + 2 <= end; j += 2) {
      const Pair even = gradient(j, masked), odd = gradient(j + 1, masked);
      if (wants_scores) s.store_ds(j, column, even.ds, odd.ds);
      s.store_p(j, column, even.p, odd.p);
    }
    if constexpr (Tile::kPack == 1) {
      if (j < end) {
        const Pair last = gradient(j, masked);
        if (wants_scores) store(s.dp + j * kGroup + column, last.ds);
        store(s.p + j * kGroup + column, last.p);
      }
    }
  };
  const auto clear = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += 2) {
      if (Tile::kPack == 1 && j + 1 == end) {
        store(s.scores + j * kGroup + column, zero);
        store(s.dp + j * kGroup + column, zero);
        break;
      }
      if (wants_scores) s.store_ds(j, column, zero, zero);
      s.store_p(j, column, zero, zero);
    }
  };
  clear(0, e.begin);
  in_stretches<Tile>(e, careful || how.rewritten, rows);
  clear(e.end, keys);
}

// Scores and dO pv^T of one column of the prompt tile -> gated p and ds; delta loses s r. Returns r, by lane.
template <class Tile>
inline Vec prompt_gradient_column(const AttentionParams& w, float gate, int64_t column, float* delta,
                                  const BackwardScratch<Tile>& s) {
  const int64_t P = w.prompt_length;
  float* scores = s.scores + column;
  float* dp = s.dp + column;
  prompt_softmax_column(w, scores, kGroup, s.slopes + column);
  Vec r = broadcast(0.f);
  for (int64_t j = 0; j < P; ++j) r = fma(load(scores + j * kGroup), load(dp + j * kGroup), r);
  if (gate == 0.f) return r;
  const Vec gates = broadcast(gate);
  store(delta + column, load(delta + column) - gates * r);
  Vec mean = r;
  if (w.softcap > 0.f) {
    for (int64_t j = 0; j < P; ++j) {
      store(dp + j * kGroup, (load(dp + j * kGroup) - r) * load(s.slopes + column + j * kGroup));
    }
    mean = broadcast(0.f);
  }
  const auto weight = [&](int64_t j) { return j < P ? load(scores + j * kGroup) * gates : broadcast(0.f); };
  const auto grad = [&](int64_t j) { return j < P ? load(dp + j * kGroup) - mean : broadcast(0.f); };
  for (int64_t j = 0; j < P; j += 2) {
    const Vec even = weight(j), odd = weight(j + 1);
    s.store_ds(j, column, even * grad(j), odd * grad(j + 1));
    s.store_p(j, column, even, odd);
  }
  return r;
}

}  // namespace
}  // namespace zinit::cpu
