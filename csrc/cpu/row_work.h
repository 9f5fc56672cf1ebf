// The parameters of what a model does to rows between its matrix products. Plain C++.
//
// Every matrix is contiguous, and every stage works on whole rows, so a result does not depend on the number of
// threads.
#pragma once
#include <cstdint>

#include "../params.h"

namespace zinit::cpu {

// The gradient of x / rms(x) * weight with respect to x; the weight is frozen.
struct NormBackwardWork {
  int64_t num_rows, columns;
  const void *grad, *x;  // [rows, columns]
  const float* weight;   // [columns]
  const float* rstd;     // [rows], 1 / rms(x)
  DType dtype;           // of grad, x and grad_x
  void* grad_x;
};

// Forward: out = silu(gate) * up. Backward, where grad is given: the gradients of both.
struct SwigluWork {
  int64_t count;  // elements
  const void *gate, *up;
  const void* grad;  // or null
  DType dtype;
  void* out;                  // forward
  void *grad_gate, *grad_up;  // backward
};

// Turns every head [D] of every token by that token's angles, in the half-split convention.
struct RotateWork {
  int64_t num_tokens, num_heads, head_dim;
  const void* x;           // [tokens, heads, D]
  const float *cos, *sin;  // [table_rows, D / 2]
  int64_t table_rows;      // token i has row i % table_rows
  bool backwards;          // by the opposite angle
  DType dtype;
  void* out;
};

// loss[i] = logsumexp(logits[i]) - logits[i][targets[i]]. With wants_gradient the logits become their gradient,
// softmax - onehot, in place.
struct CrossEntropyWork {
  int64_t num_rows, columns;
  void* logits;            // [rows, columns]
  const int64_t* targets;  // [rows], each in 0 .. columns - 1
  float* loss;             // [rows]
  DType dtype;
  bool wants_gradient;
};

// chosen[i] = a column of row i of the logits, -1 where their largest is no finite number. temperature 0: the first
// with the largest. Otherwise one is drawn: with probabilities softmax(logits / temperature), from the likeliest
// columns, as few as reach top_p.
struct ChoiceWork {
  int64_t num_rows, columns;
  const void* logits;  // [rows, columns]
  DType dtype;
  double temperature, top_p;
  const uint64_t* seeds;  // [rows]; unused at temperature 0
  int64_t* chosen;        // [rows]
};

}  // namespace zinit::cpu
