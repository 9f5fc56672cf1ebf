// Linear layers of a few rows, with the norm before them and what follows them in a decoding layer. Bound by
// reading the weights once, so an item is a run of weight rows that meets all activations.
//
// Every thread prepares the activations of a step for itself: they are a few KiB, and another thread's would
// have to be waited for.
#pragma once
#include "decode_append.h"
#include "kernels.h"
#include "linear_packed.h"
#include "linear_plain.h"

namespace zinit::cpu {
namespace {

// Of weights, about: an item takes 1 us, so that threads are done at nearly the same time. Its fixed cost is 0.1 us.
constexpr int64_t kItemBytes = 16 << 10;

inline int64_t row_bytes(const LinearWeight& weight) {
  if (weight.scheme.packed()) return ceil_div(weight.scheme.panel_bytes(weight.columns), kPanelRows);
  return weight.columns * size_of(weight.dtype);
}

// Weight rows of an item, a multiple of 16.
inline int64_t item_rows(const LinearWork& w, const LinearWeight& weight) {
  const int64_t bytes = row_bytes(weight) * (w.gated ? 2 : 1);
  return max(kPanelRows, kItemBytes / max(bytes, 1) / kPanelRows * kPanelRows);
}

inline int64_t items_of(const LinearWork& w, int i) {
  return ceil_div(w.weights[i].rows, item_rows(w, w.weights[i]));
}

int64_t linear_items(const LinearWork& w) {
  if (w.num_rows == 0) return 0;
  int64_t items = 0;
  for (int i = 0; i < (w.gated ? 1 : w.num_weights); ++i) items += items_of(w, i);
  return items;
}

// The activations in the forms that the weights of a step want.
struct LinearScratch {
  float* row;     // one row
  char* normed;   // it, normed, in its dtype
  float* floats;  // [M, padded]
  BFloat16* halves;
  IntOperand ints[3];  // by group: 32, 64, 128
  float* sums;         // [M, rows of an item], two of them where gated
  int64_t padded;
  int64_t bytes;
  bool wanted[3] = {}, wants_halves = false, wants_floats = false;

  static int of_group(const Scheme& scheme) {
    return scheme.group() == 32 ? 0 : scheme.group() == 64 ? 1 : 2;
  }

  LinearScratch(const LinearWork& w, void* memory) : floats(nullptr), halves(nullptr), ints{}, sums(nullptr) {
    const int64_t K = w.weights[0].columns, M = w.num_rows;
    // not a power of two: a column of all rows would lie in one set of the level 1 cache, which holds 8 lines. 4096
    // columns of bfloat16 took 1.3 times as long with 16 rows.
    padded = round_up(K, 128) + 32;
    Arena arena{static_cast<char*>(memory)};
    row = arena.take<float>(padded);
    normed = arena.take<char>(padded * 4);
    int64_t longest = 0;
    for (int i = 0; i < w.num_weights; ++i) {
      const LinearWeight& weight = w.weights[i];
      longest = max(longest, item_rows(w, weight));
      if (weight.scheme.packed()) {
        IntOperand& x = ints[of_group(weight.scheme)];
        if (wanted[of_group(weight.scheme)]) continue;
        wanted[of_group(weight.scheme)] = true;
        const int64_t groups = weight.scheme.groups(K);
        x.width = padded;
        x.numbers = arena.take<uint8_t>(2 * M * padded);
        x.steps = arena.take<float>(M * groups), x.sums = arena.take<float>(M * groups);
        x.starts = arena.take<int32_t>(M * groups);
      } else if (multiplies_bfloat16(weight.dtype)) {
        if (!wants_halves) halves = arena.take<BFloat16>(M * padded);
        wants_halves = true;
      } else {
        if (!wants_floats) floats = arena.take<float>(M * padded);
        wants_floats = true;
      }
    }
    sums = arena.take<float>((w.gated ? 2 : 1) * M * longest);
    bytes = arena.used;
  }
};

int64_t linear_scratch(const LinearWork& w) { return LinearScratch(w, nullptr).bytes; }

// x / rms(x) * weight, rounded to T; padded with zeros to whole vectors. Returns 1 / rms(x).
template <class T>
inline float norm_row(const float* x, const T* weight, float eps, int64_t K, T* to) {
  Vec squares[4] = {broadcast(0.f), broadcast(0.f), broadcast(0.f), broadcast(0.f)};
  for (int64_t k = 0, i = 0; k < K; k += kLanes, i = (i + 1) & 3) {
    const Vec v = load(x + k);
    squares[i] = fma(v, v, squares[i]);
  }
  const float mean =
      reduce_add((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(K);
  const float rstd = 1.f / __builtin_sqrtf(mean + eps);
  const Vec factor = broadcast(rstd);
  for (int64_t k = 0; k < K; k += kLanes) {
    T normed[kLanes];
    store(normed, load(x + k) * factor);
    const Vec scaled = load(normed) * load_columns(weight, k, K);
    if (k + kLanes <= K) {
      store(to + k, scaled);
    } else {
      store_first(to + k, K - k, scaled);
    }
  }
  return rstd;
}

// The activations of this step into a thread's scratch.
void linear_prepare(const LinearWork& w, void* memory) {
  const LinearScratch s(w, memory);
  const int64_t K = w.weights[0].columns;
  with_dtype(w.dtype, [&]<class T>() {
    for (int64_t m = 0; m < w.num_rows; ++m) {
      clear(s.row + K / kLanes * kLanes, s.padded - K / kLanes * kLanes);
      load_row(static_cast<const T*>(w.input) + m * K, K, s.row);
      if (w.norm_weight != nullptr) {
        T* normed = reinterpret_cast<T*>(s.normed);
        norm_row(s.row, static_cast<const T*>(w.norm_weight), w.eps, K, normed);
        load_row(normed, K, s.row);
      }
      if (s.wants_floats) {
        for (int64_t k = 0; k < s.padded; k += kLanes) store(s.floats + m * s.padded + k, load(s.row + k));
      }
      if (s.wants_halves) {
        for (int64_t k = 0; k < s.padded; k += kLanes) store(s.halves + m * s.padded + k, load(s.row + k));
      }
      for (int i = 0; i < 3; ++i) {
        if (!s.wanted[i]) continue;
        const int64_t group = 32 << i, groups = ceil_div(K, group);
        const IntOperand& x = s.ints[i];
        quantise_row(s.row, K, group, x.numbers + 2 * m * x.width, x.steps + m * groups, x.sums + m * groups,
                     x.starts + m * groups);
      }
    }
  });
}

// sums[m * stride + n] for `count` rows of a weight.
inline void multiply(const LinearWork& w, const LinearScratch& s, const LinearWeight& weight, int64_t first,
                     int64_t count, float* sums, int64_t stride) {
  if (weight.scheme.packed()) {
    multiply_packed(weight, first, count, s.ints[LinearScratch::of_group(weight.scheme)], w.num_rows, sums,
                    stride);
  } else if (multiplies_bfloat16(weight.dtype)) {
    multiply_plain(weight, first, count, s.halves, s.padded, w.num_rows, sums, stride);
  } else {
    multiply_plain(weight, first, count, s.floats, s.padded, w.num_rows, sums, stride);
  }
}

inline Vec silu(Vec x) {
  return x / (broadcast(1.f) + exp2_clamped(min(x * broadcast(-kLog2E), broadcast(126.f))));
}

// In place: gate = silu(gate) * up, with all three rounded to T as tensors would be.
template <class T>
inline void gate_sums(float* gate, const float* up, int64_t count) {
  T rounded[kLanes];
  const auto to_tensor = [&](Vec x) {
    store(rounded, x);
    return load(rounded);
  };
  for (int64_t n = 0; n < count; n += kLanes) {
    store(gate + n, to_tensor(silu(to_tensor(load(gate + n)))) * to_tensor(load(up + n)));
  }
}

// Row m of out[i], from column `first` on, of `count` sums; `up`: those of weight 1, where gated.
template <class T>
inline void finish_row(const LinearWork& w, int i, int64_t m, int64_t first, int64_t count, float* sums,
                       const float* up) {
  const int64_t at = m * w.weights[i].rows + first;
  if (w.gated) gate_sums<T>(sums, up, count);
  T* out = static_cast<T*>(w.out[i]) + at;
  if (w.residual == nullptr || i != 0) return store_columns(sums, broadcast(1.f), count, out);
  const T* residual = static_cast<const T*>(w.residual) + at;
  for (int64_t n = 0; n < count; n += kLanes) {
    const Vec sum = load(sums + n) + load_columns(residual, n, count);
    if (n + kLanes <= count) {
      store(out + n, sum);
    } else {
      store_first(out + n, count - n, sum);
    }
  }
}

// The weight of an item and its first row.
struct ItemPlace {
  int weight;
  int64_t first, count;  // rows
};

inline ItemPlace place_of(const LinearWork& w, int64_t item) {
  int i = 0;
  if (!w.gated) {
    for (int64_t items; item >= (items = items_of(w, i)); ++i) item -= items;
  }
  const int64_t rows = item_rows(w, w.weights[i]), first = item * rows;
  return {i, first, min(rows, w.weights[i].rows - first)};
}

Bytes linear_reads(const LinearWork& w, int64_t item) {
  const ItemPlace place = place_of(w, item);
  const LinearWeight& weight = w.weights[place.weight];
  const int64_t bytes = row_bytes(weight);
  return {static_cast<const char*>(weight.data) + place.first * bytes, place.count * bytes};
}

void linear_run(const LinearWork& w, int64_t begin, int64_t end, void* memory) {
  const LinearScratch s(w, memory);
  for (int64_t item = begin; item < end; ++item) {
    const auto [i, first, count] = place_of(w, item);
    const LinearWeight& weight = w.weights[i];
    const int64_t stride = item_rows(w, weight);
    multiply(w, s, weight, first, count, s.sums, stride);
    float* up = s.sums + w.num_rows * stride;
    if (w.gated) multiply(w, s, w.weights[1], first, count, up, stride);
    with_dtype(w.dtype, [&]<class T>() {
      for (int64_t m = 0; m < w.num_rows; ++m) {
        finish_row<T>(w, i, m, first, count, s.sums + m * stride, up + m * stride);
      }
    });
  }
}

// An item takes about 1 us.
inline int64_t norm_item_rows(const NormWork& w) { return max(1, 4096 / w.columns); }

int64_t norm_items(const NormWork& w) { return ceil_div(w.num_rows, norm_item_rows(w)); }

int64_t norm_scratch(const NormWork& w) { return round_up(w.columns, 16) * 4; }

void norm_run(const NormWork& w, int64_t begin, int64_t end, void* memory) {
  float* row = static_cast<float*>(memory);
  const int64_t rows = norm_item_rows(w);
  with_dtype(w.dtype, [&]<class T>() {
    for (int64_t m = begin * rows; m < min(end * rows, w.num_rows); ++m) {
      load_row(static_cast<const T*>(w.input) + m * w.columns, w.columns, row);
      const float rstd = norm_row(row, static_cast<const T*>(w.norm_weight), w.eps, w.columns,
                                  static_cast<T*>(w.out) + m * w.columns);
      if (w.rstd != nullptr) w.rstd[m] = rstd;
    }
  });
}

}  // namespace
}  // namespace zinit::cpu
