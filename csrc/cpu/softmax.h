// The online softmax of a score tile, one vector of queries (a column of the tile) at a time.
//
// The letters, here and in all kernels: a query meets its keys block by block. m is the largest score so far,
// p the weight exp(score - m) of a key, l the sum of all p, acc the sum of all p * value. A new block can
// raise m; then l and acc, which stand for the old m, are multiplied by alpha = exp(m_old - m_new). In the
// end out = acc / l and lse = m + log(l).
#pragma once
#include "gemm.h"
#include "strip.h"

namespace zinit::cpu {
namespace {

// Of the queries of a strip. m is that of the tile's scores: ScoreScale::remaining is not yet in it.
struct alignas(64) SoftmaxState {
  float m[kStrip], l[kStrip];
  float alpha[kStrip];  // of the last block

  void reset() {
    for (int i = 0; i < kStrip; ++i) m[i] = -kMaxFloat, l[i] = 0.f, alpha[i] = 0.f;
  }
};

// The end of a row: its result is acc times `factor`.
struct RowEnd {
  float factor;
  double lse;  // natural logarithm
};

// m: natural logarithm too.
inline RowEnd end_row(double m, float l) {
  if (l == 0.f) return {0.f, -static_cast<double>(kInfinity)};
  return {1.f / l, m + static_cast<double>(__builtin_logf(l))};
}

// With a sink, which is one more p in l. A row without keys has a sum of its sink alone.
inline RowEnd end_row(double m, float l, float sink) {
  if (sink == -kInfinity) return end_row(m, l);
  const double s = static_cast<double>(sink), top = l == 0.f || s > m ? s : m;
  const double keys = l == 0.f ? 0. : __builtin_exp(m - top);
  const double sum = keys * static_cast<double>(l) + __builtin_exp(s - top);
  return {static_cast<float>(keys / sum), top + __builtin_log(sum)};
}

// Where p is stored, as units along the keys. FloatTile's lie where the scores were.
template <class Tile>
struct WeightStore {
  typename Tile::Unit* p;
  int64_t row_units;
  void pair(int64_t j, int64_t lane, Vec even, Vec odd) const {
    if constexpr (Tile::kPack == 1) {
      store(p + j * row_units + lane, even);
      store(p + (j + 1) * row_units + lane, odd);
    } else {
      Tile::store_key_pair(p + j / 2 * row_units + lane, even, odd);
    }
  }
};

// `careful`: scores of keys that are seen may be infinite too.
template <class Tile>
[[gnu::always_inline]] inline void softmax_column(const Extent& e, const ScoreScale& how, const float* scores,
                                                  int64_t score_row, int64_t lane, SoftmaxState& state,
                                                  WeightStore<Tile> to, bool careful) {
  const float* column = scores + lane;
  const Vec m_old = load(state.m + lane);
  Vec top0 = broadcast(-kInfinity), top1 = top0;
  int64_t j = e.begin;
  for (; j + 2 <= e.end; j += 2) {
    top0 = max(top0, load(column + j * score_row));
    top1 = max(top1, load(column + (j + 1) * score_row));
  }
  if (j < e.end) top0 = max(top0, load(column + j * score_row));
  const Vec factor = broadcast(how.factor);
  const Vec m = max(m_old, max(top0, top1));
  const Vec alpha = exp2_clamped((m_old - m) * factor);

  // Of finite inputs the exponent is -inf only where some lanes are masked. Elsewhere one multiplication
  // less: 3 to 5 % of a forward of 128 tokens.
  const Vec zero = broadcast(0.f), m_exponent = m * factor;
  const bool coarse = any_ge(max(m_exponent, zero - m_exponent), broadcast(kCoarse));
  const auto weight = [&](int64_t key, bool masked) __attribute__((always_inline)) {
    const Vec s = load(column + key * score_row);
    if (masked) return exp2_clamped((s - m) * factor);
    const Vec x = fma(s, factor, zero - m_exponent);
    return careful ? exp2_clamped(x) : exp2(x);
  };
  Vec l0 = load(state.l + lane) * alpha, l1 = broadcast(0.f);
  const auto run = [&](int64_t begin, int64_t end, bool masked) __attribute__((always_inline)) {
    int64_t key = begin;
    for (; key + 2 <= end; key += 2) {
      const Vec even = weight(key, masked), odd = weight(key + 1, masked);
      l0 = l0 + even, l1 = l1 + odd;
      to.pair(key, lane, even, odd);
    }
    if constexpr (Tile::kPack == 1) {
      if (key < end) {
        const Vec last = weight(key, masked);
        l0 = l0 + last;
        store(to.p + key * to.row_units + lane, last);
      }
    }
  };
  in_stretches<Tile>(e, coarse || how.rewritten, run);
  store(state.m + lane, m);
  store(state.l + lane, l0 + l1);
  store(state.alpha + lane, alpha);
}

}  // namespace
}  // namespace zinit::cpu
