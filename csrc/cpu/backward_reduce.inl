// The second stage of backward: sums the partial gradients in a fixed order and writes them in their own
// dtype.
#pragma once
#include "kernels.h"
#include "prompt.inl"

namespace zinit::cpu {
namespace {

constexpr int64_t kReduceKeys = 64;

// An item is: one table row and key head of the prompts; all gates; or a block of keys of one head.
inline int64_t prompt_items(const BackwardPlan& p) {
  return p.wants_prompt() ? p.prompt_rows * p.num_heads_kv : 0;
}
inline int64_t gate_items(const BackwardPlan& p) { return p.grad_gate != nullptr ? 1 : 0; }
inline int64_t key_blocks(const BackwardPlan& p) {
  return p.key_partials != nullptr ? ceil_div(p.seqlen_k, kReduceKeys) : 0;
}

// scale times the sum of partials [splits][2, rows_per_part, padded_dim] into a row of length D.
template <class T>
inline void add_partials(const BackwardPlan& p, const float* partial, int64_t part, float scale, T* to) {
  for (int64_t d = 0; d < p.head_dim; d += kLanes) {
    Vec sum = load(partial + d);
    for (int64_t split = 1; split < p.splits; ++split) sum = sum + load(partial + split * part + d);
    sum = sum * broadcast(scale);
    if (d + kLanes <= p.head_dim)
      store(to + d, sum);
    else
      store_first(to + d, p.head_dim - d, sum);
  }
}

inline void reduce_prompt(const BackwardPlan& p, int64_t row, int64_t head, float* sums) {
  const int64_t floats = p.prompt_length * p.padded_dim;
  __builtin_memset(sums, 0, static_cast<size_t>(2 * floats) * sizeof(float));
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    if (Prompt(p, b).row != row) continue;
    const float* partial = p.prompt_partials + (b * p.num_heads_kv + head) * p.splits * 2 * floats;
    for (int64_t split = 0; split < p.splits; ++split, partial += 2 * floats) {
      for (int64_t i = 0; i < 2 * floats; i += kLanes) store(sums + i, load(sums + i) + load(partial + i));
    }
  }
  const auto write = [&](const View& view, const float* from, float scale) {
    if (view.data == nullptr) return;
    visit_rows(row_pointer(view, row, head, 0), view.token, view.dtype, [&](auto to) {
      for (int64_t j = 0; j < p.prompt_length; ++j) {
        store_columns(from + j * p.padded_dim, broadcast(scale), p.head_dim, to[j]);
      }
    });
  };
  write(p.grad_prompt_key, sums, p.scale);
  write(p.grad_prompt_value, sums + floats, 1.f);
}

inline void reduce_gates(const BackwardPlan& p) {
  for (int64_t i = 0; i < p.gate_rows * p.num_heads_q; ++i) p.grad_gate[i] = 0.f;
  for (int64_t head = 0; head < p.num_heads_q; ++head) {
    for (int64_t row = 0; row < p.gate_rows; ++row) {
      double sum = 0;
      bool used = false;
      for (int64_t b = 0; b < p.num_sequences; ++b) {
        const Prompt prompt(p, b);
        if (!prompt.given() || prompt.gate_row != row) continue;
        used = true;
        const int64_t blocks = ceil_div(Sequence(p, b).queries, p.block_queries);
        const float* partial = p.gate_partials + (b * p.num_heads_q + head) * p.blocks;
        for (int64_t i = 0; i < blocks; ++i) sum += static_cast<double>(partial[i]);
      }
      if (!used) continue;  // its gate may be NaN
      const float raw = p.gate[row * p.num_heads_q + head];
      const double act = p.tanh_gate ? static_cast<double>(__builtin_tanhf(raw)) : 0.;
      p.grad_gate[row * p.num_heads_q + head] = static_cast<float>(sum * (1. - act * act));
    }
  }
}

inline void reduce_keys(const BackwardPlan& p, int64_t b, int64_t head, int64_t block) {
  const Sequence sequence(p, b);
  const int64_t part = p.seqlen_k * p.padded_dim;
  const float* partial = p.key_partials + (b * p.num_heads_kv + head) * p.splits * 2 * part;
  const auto write = [&](const View& view, const float* from, float scale) {
    if (view.data == nullptr) return;
    visit_rows(sequence.key_row(view, head, 0), view.token, view.dtype, [&](auto to) {
      for (int64_t j = block; j < min(block + kReduceKeys, sequence.keys); ++j) {
        add_partials(p, from + j * p.padded_dim, 2 * part, scale, to[j]);
      }
    });
  };
  write(p.grad_key, partial, p.scale);
  write(p.grad_value, partial + part, 1.f);
}

int64_t backward_reduce_items(const BackwardPlan& p) {
  return prompt_items(p) + gate_items(p) + p.num_sequences * p.num_heads_kv * key_blocks(p);
}

int64_t backward_reduce_scratch(const BackwardPlan& p) {
  return p.wants_prompt() ? 2 * p.prompt_length * p.padded_dim * static_cast<int64_t>(sizeof(float)) : 0;
}

void backward_reduce_run(const BackwardPlan& p, int64_t begin, int64_t end, void* scratch) {
  for (int64_t item = begin; item < end; ++item) {
    int64_t i = item;
    if (i < prompt_items(p)) {
      reduce_prompt(p, i / p.num_heads_kv, i % p.num_heads_kv, static_cast<float*>(scratch));
    } else if ((i -= prompt_items(p)) < gate_items(p)) {
      reduce_gates(p);
    } else {
      i -= gate_items(p);
      const int64_t pair = i / key_blocks(p);
      reduce_keys(p, pair / p.num_heads_kv, pair % p.num_heads_kv, i % key_blocks(p) * kReduceKeys);
    }
  }
}

}  // namespace
}  // namespace zinit::cpu
