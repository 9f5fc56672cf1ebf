// The online softmax of a score tile, one vector of queries (a column of the tile) at a time.
#pragma once
#include "strip.inl"

namespace zinit::cpu {
namespace {

// Running maximum and sum of a strip; the maximum is that of the tile's scores.
struct alignas(64) SoftmaxState {
  float maximum[kStrip], sum[kStrip];
  float decay[kStrip];  // by what the last update scales what was accumulated before it

  void reset() {
    for (int i = 0; i < kStrip; ++i) maximum[i] = -kMaxFloat, sum[i] = 0.f, decay[i] = 0.f;
  }
};

// Stores weights as units along the keys; FloatTile's lie where the scores were.
template <class Tile>
struct WeightStore {
  typename Tile::Unit* weights;
  int64_t row_units;
  void pair(int64_t j, int64_t lane, Vec even, Vec odd) const {
    if constexpr (Tile::kPack == 1) {
      store(weights + j * row_units + lane, even);
      store(weights + (j + 1) * row_units + lane, odd);
    } else {
      Tile::store_key_pair(weights + j / 2 * row_units + lane, even, odd);
    }
  }
};

template <class Tile>
inline void softmax_column(const Extent& e, const ScoreScale& how, const float* scores, int64_t score_row,
                           int64_t lane, SoftmaxState& state, WeightStore<Tile> out) {
  const float* column = scores + lane;
  const Vec before = load(state.maximum + lane);
  Vec top0 = broadcast(-kInfinity), top1 = top0;
  int64_t j = e.begin;
  for (; j + 2 <= e.end; j += 2) {
    top0 = max(top0, load(column + j * score_row));
    top1 = max(top1, load(column + (j + 1) * score_row));
  }
  if (j < e.end) top0 = max(top0, load(column + j * score_row));
  const Vec factor = broadcast(how.factor);
  const Vec now = max(before, max(top0, top1));
  const Vec decay = exp2_clamped((before - now) * factor);

  // Where some lanes are masked the exponent can be -inf, elsewhere not. One multiplication less there: 3 to
  // 5 % of a forward of 128 tokens.
  const Vec zero = broadcast(0.f), pivot = now * factor;
  const bool coarse = any_ge(max(pivot, zero - pivot), broadcast(kCoarse));
  const auto weight = [&](int64_t key, bool masked) {
    const Vec s = load(column + key * score_row);
    return masked ? exp2_clamped((s - now) * factor) : exp2(fma(s, factor, zero - pivot));
  };
  Vec sum0 = load(state.sum + lane) * decay, sum1 = broadcast(0.f);
  const auto run = [&](int64_t begin, int64_t end, bool masked) {
    int64_t key = begin;
    for (; key + 2 <= end; key += 2) {
      const Vec even = weight(key, masked), odd = weight(key + 1, masked);
      sum0 = sum0 + even, sum1 = sum1 + odd;
      out.pair(key, lane, even, odd);
    }
    if constexpr (Tile::kPack == 1) {
      if (key < end) {
        const Vec last = weight(key, masked);
        sum0 = sum0 + last;
        store(out.weights + key * out.row_units + lane, last);
      }
    }
  };
  // Whole pairs of the part every lane sees.
  const int64_t full_begin = round_up(e.full_begin, Tile::kPack),
                full_end = e.full_end - e.full_end % Tile::kPack;
  if (coarse || how.biased || full_begin >= full_end) {
    run(e.begin, e.end, true);
  } else {
    run(e.begin, full_begin, true);
    run(full_begin, full_end, false);
    run(full_end, e.end, true);
  }
  store(state.maximum + lane, now);
  store(state.sum + lane, sum0 + sum1);
  store(state.decay + lane, decay);
}

}  // namespace
}  // namespace zinit::cpu
