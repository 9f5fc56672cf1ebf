// What a training step does between its matrix products: the gradient of a norm, SwiGLU, rotary embedding, and
// the cross-entropy. Each reads its operands from memory once; PyTorch's own operators pass over them up to
// twelve times.
#pragma once
#include "kernels.h"
#include "row_work.h"
#include "tiles.h"

namespace zinit::cpu {
namespace {

constexpr int64_t kItemElements = 1 << 14;  // of an item, about: its operands stay in the level 2 cache

// Rows of an item.
inline int64_t rows_of_item(int64_t columns) { return max(1, kItemElements / max(columns, 1)); }

template <class T>
inline void store_lanes(T* row, int64_t d, int64_t D, Vec x) {
  if (d + kLanes <= D) {
    store(row + d, x);
  } else {
    store_first(row + d, D - d, x);
  }
}

int64_t no_scratch(const NormBackwardWork&) { return 0; }
int64_t no_scratch(const SwigluWork&) { return 0; }
int64_t no_scratch(const RotateWork&) { return 0; }

// with n = x rstd and g = grad weight: rstd (g - n mean(g n))
int64_t norm_backward_items(const NormBackwardWork& w) {
  return ceil_div(w.num_rows, rows_of_item(w.columns));
}

template <class T>
inline void norm_backward_row(const T* grad, const T* x, const float* weight, float rstd, int64_t C, T* to) {
  Vec sums[2] = {broadcast(0.f), broadcast(0.f)};
  for (int64_t d = 0, i = 0; d < C; d += kLanes, i ^= 1) {
    const Vec g = load_columns(grad, d, C) * load_columns(weight, d, C);
    sums[i] = fma(g, load_columns(x, d, C), sums[i]);
  }
  // mean(g n) rstd: what is taken away of x
  const float along = reduce_add(sums[0] + sums[1]) * rstd * rstd / static_cast<float>(C);
  const Vec minus = broadcast(-along), scale = broadcast(rstd);
  for (int64_t d = 0; d < C; d += kLanes) {
    const Vec g = load_columns(grad, d, C) * load_columns(weight, d, C);
    store_lanes(to, d, C, fma(load_columns(x, d, C), minus, g) * scale);
  }
}

void norm_backward_run(const NormBackwardWork& w, int64_t begin, int64_t end, void*) {
  const int64_t rows = rows_of_item(w.columns), C = w.columns;
  with_dtype(w.dtype, [&]<class T>() {
    for (int64_t m = begin * rows; m < min(end * rows, w.num_rows); ++m) {
      norm_backward_row(static_cast<const T*>(w.grad) + m * C, static_cast<const T*>(w.x) + m * C, w.weight,
                        w.rstd[m], C, static_cast<T*>(w.grad_x) + m * C);
    }
  });
}

int64_t swiglu_items(const SwigluWork& w) { return ceil_div(w.count, kItemElements); }

inline Vec sigmoid(Vec x) {
  const Vec one = broadcast(1.f);
  return one / (one + exp2_clamped(min(x * broadcast(-kLog2E), broadcast(126.f))));
}

template <class T>
inline Vec rounded_to(Vec x) {
  T rounded[kLanes];
  store(rounded, x);
  return load(rounded);
}

template <class T>
inline void swiglu_forward(const T* gate, const T* up, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec g = load_columns(gate, i, n);
    // rounded between the two, as it is while decoding
    store_lanes(out, i, n, rounded_to<T>(g * sigmoid(g)) * load_columns(up, i, n));
  }
}

template <class T>
inline void swiglu_backward(const T* grad, const T* gate, const T* up, int64_t n, T* grad_gate, T* grad_up) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec d = load_columns(grad, i, n), g = load_columns(gate, i, n);
    const Vec s = sigmoid(g), silu = g * s;
    store_lanes(grad_up, i, n, d * silu);
    // silu' = s + silu (1 - s)
    store_lanes(grad_gate, i, n, d * load_columns(up, i, n) * fma(silu, broadcast(1.f) - s, s));
  }
}

void swiglu_run(const SwigluWork& w, int64_t begin, int64_t end, void*) {
  const int64_t first = begin * kItemElements, count = min(end * kItemElements, w.count) - first;
  with_dtype(w.dtype, [&]<class T>() {
    const T *gate = static_cast<const T*>(w.gate) + first, *up = static_cast<const T*>(w.up) + first;
    if (w.grad == nullptr) {
      swiglu_forward(gate, up, count, static_cast<T*>(w.out) + first);
    } else {
      swiglu_backward(static_cast<const T*>(w.grad) + first, gate, up, count,
                      static_cast<T*>(w.grad_gate) + first, static_cast<T*>(w.grad_up) + first);
    }
  });
}

int64_t rotate_items(const RotateWork& w) {
  return ceil_div(w.num_tokens, rows_of_item(w.num_heads * w.head_dim));
}

template <class T>
inline void rotate_head(const T* x, const float* cos, const float* sin, Vec sign, int64_t half, T* out) {
  for (int64_t d = 0; d < half; d += kLanes) {
    const Vec a = load_columns(x, d, half), b = load_columns(x + half, d, half);
    const Vec c = load_columns(cos, d, half), s = load_columns(sin, d, half) * sign;
    store_lanes(out, d, half, fma(a, c, broadcast(0.f) - b * s));
    store_lanes(out + half, d, half, fma(b, c, a * s));
  }
}

void rotate_run(const RotateWork& w, int64_t begin, int64_t end, void*) {
  const int64_t rows = rows_of_item(w.num_heads * w.head_dim), half = w.head_dim / 2;
  const Vec sign = broadcast(w.backwards ? -1.f : 1.f);
  with_dtype(w.dtype, [&]<class T>() {
    for (int64_t t = begin * rows; t < min(end * rows, w.num_tokens); ++t) {
      const int64_t angles = t % w.table_rows * half;
      for (int64_t h = 0; h < w.num_heads; ++h) {
        const int64_t at = (t * w.num_heads + h) * w.head_dim;
        rotate_head(static_cast<const T*>(w.x) + at, w.cos + angles, w.sin + angles, sign, half,
                    static_cast<T*>(w.out) + at);
      }
    }
  });
}

int64_t cross_entropy_items(const CrossEntropyWork& w) { return w.num_rows; }

// A row of exponentials; of float32 logits they take the place of the logits.
int64_t cross_entropy_scratch(const CrossEntropyWork& w) {
  return w.dtype == DType::kFloat32 ? 0 : round_up(w.columns, kLanes) * 4;
}

// The loss of a row.
template <class T>
inline float cross_entropy_row(T* logits, int64_t target, int64_t V, bool wants_gradient,
                               float* exponentials) {
  Vec most[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
  int64_t d = 0;
  for (; d + 2 * kLanes <= V; d += 2 * kLanes) {
    most[0] = max(most[0], load(logits + d)), most[1] = max(most[1], load(logits + d + kLanes));
  }
  float highest = reduce_max(max(most[0], most[1]));
  for (; d < V; ++d) {
    const float x = to_float(logits[d]);
    highest = x > highest ? x : highest;
  }
  const float of_target = to_float(logits[target]);

  const Vec shift = broadcast(highest), log2e = broadcast(kLog2E);
  Vec sums[4] = {broadcast(0.f), broadcast(0.f), broadcast(0.f), broadcast(0.f)};
  float rest = 0.f;
  for (int64_t i = d = 0; d < V; d += kLanes, i = (i + 1) & 3) {
    const Vec e = exp2_clamped((load_columns(logits, d, V) - shift) * log2e);
    if (wants_gradient) store_lanes(exponentials, d, V, e);
    if (d + kLanes <= V) {
      sums[i] = sums[i] + e;
    } else {
      float last[kLanes];
      store(last, e);
      for (int64_t j = 0; j < V - d; ++j) rest += last[j];
    }
  }
  const float total = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
  if (wants_gradient) {
    const Vec scale = broadcast(1.f / total);
    const float at_target = exponentials[target] / total - 1.f;
    for (d = 0; d < V; d += kLanes) store_lanes(logits, d, V, load_columns(exponentials, d, V) * scale);
    from_float(at_target, logits + target);
  }
  return __builtin_logf(total) + (highest - of_target);
}

void cross_entropy_run(const CrossEntropyWork& w, int64_t begin, int64_t end, void* scratch) {
  with_dtype(w.dtype, [&]<class T>() {
    for (int64_t m = begin; m < end; ++m) {
      T* logits = static_cast<T*>(w.logits) + m * w.columns;
      float* exponentials =
          w.dtype == DType::kFloat32 ? reinterpret_cast<float*>(logits) : static_cast<float*>(scratch);
      w.loss[m] = cross_entropy_row(logits, w.targets[m], w.columns, w.wants_gradient, exponentials);
    }
  });
}

}  // namespace
}  // namespace zinit::cpu
