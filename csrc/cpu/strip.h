// One strip of queries (one to a lane) against one block of keys: which part of the score tile exists, and
// its masks.
#pragma once
#include "../params.h"
#include "gemm.h"
#include "sequence.h"
#include "softcap.h"

namespace zinit::cpu {
namespace {

// A float32 beyond this is too coarse to be subtracted from an exponent: its rounding reaches 0.1 % of every
// weight of the row, and at 2^30 whole powers of 2.
constexpr float kCoarse = 1 << 14;

// How scores become exponents of 2: (s - m) * factor. Where m * factor is not coarse, s * factor - m * factor
// is cheaper. With a key bias, a soft cap, or scale <= 0, where the largest product is not the largest score,
// the tile is first rewritten as cap(s * scale) + bias. It is clamped to finite numbers unless the key is
// hidden, so a huge negative bias stays a number.
struct ScoreScale {
  bool rewritten;
  float cap;        // 0: none
  float scale;      // what the rewriting multiplies with
  float remaining;  // what a score of the tile still lacks: scale, or 1 once rewritten
  float factor;     // the same for an exponent of 2
  explicit ScoreScale(const AttentionParams& w)
      : rewritten(w.key_bias.given || w.softcap > 0.f || !(w.scale > 0)),
        cap(w.softcap),
        scale(w.scale),
        remaining(rewritten ? 1.f : scale),
        factor(remaining * kLog2E) {}
};

// The keys of a block, numbered from its start, that one vector of queries needs: some lane sees [begin,
// end), and every lane sees [full_begin, full_end) within it.
struct Extent {
  int64_t begin = 0, end = 0, full_begin = 0, full_end = 0;
  bool empty() const { return begin >= end; }
};

// Queries first .. first + lanes - 1, lanes >= 1, against the keys from `block` on, `count` of them.
template <class Tile>
inline Extent extent_of(const Visibility& visible, int64_t first, int64_t lanes, int64_t block,
                        int64_t count) {
  const auto inside = [=](int64_t j) { return min(max(j - block, 0), count); };
  const int64_t last = first + lanes - 1;
  Extent e;
  e.begin = inside(visible.lower(first));
  e.end = inside(visible.upper(last));
  if (e.begin >= e.end) return {};
  e.full_begin = max(e.begin, inside(visible.lower(last)));
  e.full_end = min(e.end, inside(visible.upper(first)));
  if (e.full_begin >= e.full_end) e.full_begin = e.full_end = e.begin;
  // Whole units along the keys; the keys added are masked.
  e.begin -= e.begin % Tile::kPack;
  e.end = round_up(e.end, Tile::kPack);
  return e;
}

// f(begin, end, masked) on the keys of an extent, in order. The part that every lane sees is not masked, in whole
// units, unless `all_masked`.
template <class Tile, class F>
[[gnu::always_inline]] inline void in_stretches(const Extent& e, bool all_masked, const F& f) {
  const int64_t full_begin = round_up(e.full_begin, Tile::kPack);
  const int64_t full_end = e.full_end - e.full_end % Tile::kPack;
  if (all_masked || full_begin >= full_end) {
    f(e.begin, e.end, true);
  } else {
    f(e.begin, full_begin, true);
    f(full_begin, full_end, false);
    f(full_end, e.end, true);
  }
}

// Both vectors of a strip of `rows` queries.
template <class Tile>
inline void strip_extents(const Visibility& visible, int64_t first, int64_t rows, int64_t block,
                          int64_t count, Extent extents[2]) {
  for (int v = 0; v < 2; ++v) {
    const int64_t lanes = min(kLanes, rows - v * kLanes);
    if (lanes > 0) extents[v] = extent_of<Tile>(visible, first + v * kLanes, lanes, block, count);
  }
}

// scores[key][lane] = rows[key] . transposed[.][lane], only where a vector needs them.
template <class Tile>
inline void score_tile(const typename Tile::Unit* rows, int64_t row_units,
                       const typename Tile::Unit* transposed, int64_t steps, const Extent extents[2],
                       float* scores, int64_t score_row) {
  const Product<Tile> product{rows, row_units, 1, transposed, kStrip};
  const Overwrite into{scores, score_row};
  const Extent &low = extents[0], &high = extents[1];
  const int64_t both_begin = max(low.begin, high.begin), both_end = min(low.end, high.end);
  if (both_begin < both_end) {
    product_rows<Tile, 2>(product, into, both_begin, both_end, 0, steps);
    for (int v = 0; v < 2; ++v) {
      product_rows<Tile, 1>(product, into, extents[v].begin, both_begin, v * kLanes, steps);
      product_rows<Tile, 1>(product, into, both_end, extents[v].end, v * kLanes, steps);
    }
  } else {
    for (int v = 0; v < 2; ++v) {
      product_rows<Tile, 1>(product, into, extents[v].begin, extents[v].end, v * kLanes, steps);
    }
  }
}

// Rewrites the part of one vector's column that needs it: bias, cap and scale everywhere, -inf where a lane
// does not see the key. `first` is the query in lane 0; bias and scores start at key `block`. `slopes`: where
// the derivative of the cap goes, if there is one and somebody wants it.
inline void mask_column(const Visibility& visible, int64_t first, const Extent& e, int64_t block,
                        const ScoreScale& how, const float* bias, float* scores, int64_t score_row,
                        float* slopes = nullptr) {
  if (how.rewritten) {
    const bool capped = how.cap > 0.f;
    if (capped) cap_scores(e.begin, e.end, how.scale, how.cap, scores, score_row, slopes);
    const Vec scale = broadcast(capped ? 1.f : how.scale);
    for (int64_t j = e.begin; j < e.end; ++j) {
      const float b = bias == nullptr || block + j >= visible.keys ? 0.f : bias[j];
      const Vec t = max(broadcast(-kMaxFloat), fma(load(scores + j * score_row), scale, broadcast(b)));
      store(scores + j * score_row, b == -kInfinity ? broadcast(-kInfinity) : t);
    }
  }
  const Vec lane = lane_numbers(), nothing = broadcast(-kInfinity);
  const auto clamp = [](int64_t n) { return static_cast<float>(min(max(n, -1), kLanes)); };
  const auto mask = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t ahead = block + j - visible.offset - first;  // the lane whose diagonal this key is
      const float lowest = visible.right < 0 ? 0.f : clamp(ahead - visible.right);
      const float highest = block + j >= visible.keys ? -1.f
                            : visible.left < 0        ? kLanes
                                                      : clamp(ahead + visible.left);
      Vec s = load(scores + j * score_row);
      s = select_ge(lane, broadcast(lowest), s, nothing);
      store(scores + j * score_row, select_ge(broadcast(highest), lane, s, nothing));
    }
  };
  mask(e.begin, e.full_begin);
  mask(e.full_end, e.end);
}

// The keys that every group of kRows queries sees, in units along the keys: what a product over the keys has
// to visit.
template <class Tile>
inline void query_group_ranges(const Visibility& visible, int64_t first, int64_t queries, int64_t block,
                               int64_t count, Range* ranges) {
  for (int64_t row = 0, g = 0; row < queries; row += kRows, ++g) {
    const int64_t last = min(row + kRows, queries) - 1;
    const int64_t begin = min(max(visible.lower(first + row) - block, 0), count);
    const int64_t end = min(max(visible.upper(first + last) - block, 0), count);
    ranges[g] = begin < end ? Range{begin / Tile::kPack, ceil_div(end, Tile::kPack)} : Range{0, 0};
  }
}

}  // namespace
}  // namespace zinit::cpu
