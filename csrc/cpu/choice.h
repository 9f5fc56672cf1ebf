// The choice of a token from a row of logits: the likeliest, or one drawn from the likeliest ones.
#pragma once
#include "kernels.h"
#include "tiles.h"

namespace zinit::cpu {
namespace {

int64_t choice_items(const ChoiceWork& w) { return w.num_rows; }

// A row's weights and the columns that may be drawn; nothing where the likeliest is taken.
int64_t choice_scratch(const ChoiceWork& w) { return w.temperature == 0 ? 0 : round_up(w.columns, 16) * 8; }

// The largest of a row; NaN where one of them is.
template <class T>
inline float largest_of(const T* logits, int64_t V) {
  Vec most[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
  Vec nans = broadcast(0.f);
  const auto meet = [&](Vec x, int i) {
    most[i] = max(x, most[i]);
    nans = nans + select_ge(x, x, broadcast(0.f), broadcast(1.f));
  };
  int64_t d = 0;
  for (; d + 2 * kLanes <= V; d += 2 * kLanes) meet(load(logits + d), 0), meet(load(logits + d + kLanes), 1);
  float highest = reduce_max(max(most[0], most[1]));
  bool numbers = reduce_add(nans) == 0.f;
  for (; d < V; ++d) {
    const float x = to_float(logits[d]);
    numbers = numbers && x == x;
    highest = x > highest ? x : highest;
  }
  return numbers ? highest : __builtin_nanf("");
}

// The first column with the largest, which is a number.
template <class T>
inline int64_t first_of(const T* logits, int64_t V, float highest) {
  int64_t d = 0;
  while (d + kLanes <= V && !any_ge(load(logits + d), broadcast(highest))) d += kLanes;
  while (!(to_float(logits[d]) >= highest)) ++d;
  return d;
}

// weights[d] = 2^((logits[d] - highest) * factor). Returns their sum.
template <class T>
inline float weigh(const T* logits, int64_t V, float highest, float factor, float* weights) {
  Vec sums[2] = {broadcast(0.f), broadcast(0.f)};
  float rest = 0.f;
  int64_t d = 0;
  for (int i = 0; d + kLanes <= V; d += kLanes, i ^= 1) {
    const Vec weight = exp2_clamped((load(logits + d) - broadcast(highest)) * broadcast(factor));
    store(weights + d, weight);
    sums[i] = sums[i] + weight;
  }
  if (d < V) {
    store(weights + d,
          exp2_clamped((load_first(logits + d, V - d) - broadcast(highest)) * broadcast(factor)));
    for (; d < V; ++d) rest += weights[d];
  }
  return reduce_add(sums[0] + sums[1]) + rest;
}

// The sum of the weights that are at least `least`. Those behind the row, up to a whole vector, must be 0.
inline float sum_from(const float* weights, int64_t V, float least) {
  Vec sums[2] = {broadcast(0.f), broadcast(0.f)};
  for (int64_t d = 0, i = 0; d < V; d += kLanes, i ^= 1) {
    const Vec weight = load(weights + d);
    sums[i] = sums[i] + select_ge(weight, broadcast(least), weight, broadcast(0.f));
  }
  return reduce_add(sums[0] + sums[1]);
}

// A heap of columns, the largest weight first; of equal weights the lower column.
struct Heap {
  const float* weights;
  int32_t* columns;
  int64_t count;

  bool before(int32_t a, int32_t b) const {
    return weights[a] > weights[b] || (weights[a] == weights[b] && a < b);
  }
  void sink(int64_t i) const {
    const int32_t sunk = columns[i];
    for (int64_t child; (child = 2 * i + 1) < count; i = child) {
      if (child + 1 < count && before(columns[child + 1], columns[child])) ++child;
      if (!before(columns[child], sunk)) break;
      columns[i] = columns[child];
    }
    columns[i] = sunk;
  }
  void build() const {
    for (int64_t i = count / 2; i-- > 0;) sink(i);
  }
  int32_t pop() {
    const int32_t top = columns[0];
    columns[0] = columns[--count];
    if (count > 0) sink(0);
    return top;
  }
};

// In a race each column comes in after a time that is exponential with its weight as the rate: so it is the first
// with its share of the weights. The number behind a column's time, in 0 .. 1, depends on the seed and the column alone
// (splitmix64).
inline double number_of(uint64_t seed, int32_t column) {
  uint64_t x = seed + (static_cast<uint64_t>(column) + 1) * 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  x ^= x >> 31;
  return (static_cast<double>(x >> 12) + 0.5) * 0x1p-52;
}

struct Race {
  const float* weights;
  uint64_t seed;
  int64_t winner;
  double best = 0;

  void enter(int32_t column) {
    const double number = number_of(seed, column), weight = static_cast<double>(weights[column]);
    // -log(u) is at least 1 - u, so most columns need no logarithm
    if (weight <= best * (1 - number)) return;
    const double speed = weight / -__builtin_log(number);
    if (speed > best) best = speed, winner = column;
  }
};

// The winner of the race among the nucleus: the likeliest columns, as few as reach top_p of the sum. A row's
// nucleus is small nearly always. So the columns above a threshold are ordered, which is lowered until they hold
// the nucleus.
inline int64_t draw(float* weights, int64_t V, float sum, double top_p, uint64_t seed, int32_t* columns) {
  Race race{weights, seed, 0};
  if (top_p >= 1) {
    for (int64_t d = 0; d < V; ++d) race.enter(static_cast<int32_t>(d));
    return race.winner;
  }
  const double wanted = top_p * static_cast<double>(sum);
  float least = 0x1p-6f;
  // sums are off by rounding: a threshold that is only just low enough is lowered once more
  while (least > 0x1p-120f && static_cast<double>(sum_from(weights, V, least)) < wanted * (1 + 1e-5))
    least *= 0x1p-6f;
  if (!(least > 0x1p-120f)) least = 0x1p-149f;  // all that are not 0
  Heap heap{weights, columns, 0};
  for (int64_t d = 0; d < V; d += kLanes) {
    if (!any_ge(load(weights + d), broadcast(least))) continue;
    for (int64_t i = d; i < min(d + kLanes, V); ++i) {
      if (weights[i] >= least) columns[heap.count++] = static_cast<int32_t>(i);
    }
  }
  heap.build();
  race.winner = columns[0];
  for (double before = 0; heap.count > 0 && before <= wanted;) {
    const int32_t column = heap.pop();
    race.enter(column);
    before += static_cast<double>(weights[column]);
  }
  return race.winner;
}

void choice_run(const ChoiceWork& w, int64_t begin, int64_t end, void* scratch) {
  const int64_t V = w.columns;
  with_dtype(w.dtype, [&]<class T>() {
    for (int64_t m = begin; m < end; ++m) {
      const T* logits = static_cast<const T*>(w.logits) + m * V;
      const float highest = largest_of(logits, V);
      if (!(highest >= -kMaxFloat && highest <= kMaxFloat)) {
        w.chosen[m] = -1;
      } else if (w.temperature == 0) {
        w.chosen[m] = first_of(logits, V, highest);
      } else {
        auto* weights = static_cast<float*>(scratch);
        auto* columns = reinterpret_cast<int32_t*>(weights + round_up(V, 16));
        for (int64_t d = V / kLanes * kLanes; d < round_up(V, 16); ++d) weights[d] = 0.f;
        // no temperature makes a difference of 0 anything but 0, or overflows
        const double factor = static_cast<double>(kLog2E) / w.temperature;
        const float sum =
            weigh(logits, V, highest, factor > 1e38 ? 1e38f : static_cast<float>(factor), weights);
        for (int64_t d = V; d < round_up(V, 16); ++d) weights[d] = 0.f;
        w.chosen[m] = draw(weights, V, sum, w.top_p, w.seeds[m], columns);
      }
    }
  });
}

}  // namespace
}  // namespace zinit::cpu
