// The second stage of backward: sums the partial gradients in a fixed order and writes them in their own
// dtype.
#pragma once
#include "sequence.h"
#include "tiles.h"
#include "work.h"

namespace zinit::cpu {
namespace {

constexpr int64_t kReduceKeys = 64;

// An item is: one table row and key head of the prompts; all gates; all sinks; or a block of keys of one head.
inline int64_t prompt_items(const BackwardWork& w) {
  return w.wants_prompt() ? w.prompt_rows * w.num_heads_kv : 0;
}
inline int64_t gate_items(const BackwardWork& w) { return w.grad_gate.given ? 1 : 0; }
inline int64_t sink_items(const BackwardWork& w) { return w.grad_sinks.given ? 1 : 0; }
inline int64_t key_blocks(const BackwardWork& w) {
  return w.stores_partials() ? ceil_div(w.seqlen_k, kReduceKeys) : 0;
}

// scale times the sum of partials [splits][2, rows_per_part, padded_dim] into a row of length D.
template <class T>
inline void add_partials(const BackwardWork& w, const float* partial, int64_t part, float scale, T* to) {
  for (int64_t d = 0; d < w.head_dim; d += kLanes) {
    Vec sum = load(partial + d);
    for (int64_t split = 1; split < w.splits; ++split) sum = sum + load(partial + split * part + d);
    sum = sum * broadcast(scale);
    if (d + kLanes <= w.head_dim)
      store(to + d, sum);
    else
      store_first(to + d, w.head_dim - d, sum);
  }
}

inline void reduce_prompt(const BackwardWork& w, int64_t row, int64_t head, float* sums) {
  const int64_t floats = w.prompt_length * w.padded_dim;
  clear(sums, 2 * floats);
  for (int64_t b = 0; b < w.num_sequences; ++b) {
    if (Prompt(w, b).row != row) continue;
    const float* partial = w.prompt_partials + (b * w.num_heads_kv + head) * w.splits * 2 * floats;
    for (int64_t split = 0; split < w.splits; ++split, partial += 2 * floats) {
      for (int64_t i = 0; i < 2 * floats; i += kLanes) store(sums + i, load(sums + i) + load(partial + i));
    }
  }
  const auto write = [&](const View& view, const float* from, float scale) {
    if (!view.given) return;
    visit_rows(row_pointer(view, row, head, 0), view.token, view.dtype, [&](auto to) {
      for (int64_t j = 0; j < w.prompt_length; ++j) {
        store_columns(from + j * w.padded_dim, broadcast(scale), w.head_dim, to[j]);
      }
    });
  };
  write(w.grad_prompt_key, sums, w.scale);
  write(w.grad_prompt_value, sums + floats, 1.f);
}

inline void reduce_gates(const BackwardWork& w) {
  for (int64_t i = 0; i < w.gate_rows * w.num_heads_q; ++i) w.grad_gate.data[i] = 0.f;
  for (int64_t head = 0; head < w.num_heads_q; ++head) {
    for (int64_t row = 0; row < w.gate_rows; ++row) {
      double sum = 0;
      bool used = false;
      for (int64_t b = 0; b < w.num_sequences; ++b) {
        const Prompt prompt(w, b);
        if (!prompt.given() || prompt.gate_row != row) continue;
        used = true;
        const int64_t blocks = ceil_div(Sequence(w, b).queries, w.block_queries);
        const float* partial = w.gate_partials + (b * w.num_heads_q + head) * w.blocks;
        for (int64_t i = 0; i < blocks; ++i) sum += static_cast<double>(partial[i]);
      }
      if (!used) continue;  // its gate may be NaN
      const float raw = w.gate[row * w.num_heads_q + head];
      const double act = w.tanh_gate ? static_cast<double>(__builtin_tanhf(raw)) : 0.;
      w.grad_gate.data[row * w.num_heads_q + head] = static_cast<float>(sum * (1. - act * act));
    }
  }
}

inline void reduce_sinks(const BackwardWork& w) {
  for (int64_t head = 0; head < w.num_heads_q; ++head) {
    double sum = 0;
    for (int64_t b = 0; b < w.num_sequences; ++b) {
      const int64_t blocks = ceil_div(Sequence(w, b).queries, w.block_queries);
      const float* partial = w.sink_partials + (b * w.num_heads_q + head) * w.blocks;
      for (int64_t i = 0; i < blocks; ++i) sum += static_cast<double>(partial[i]);
    }
    w.grad_sinks.data[head] = static_cast<float>(sum);
  }
}

inline void reduce_keys(const BackwardWork& w, int64_t b, int64_t head, int64_t block) {
  const Sequence sequence(w, b);
  const int64_t part = w.seqlen_k * w.padded_dim;
  const float* partial = w.key_partials + (b * w.num_heads_kv + head) * w.splits * 2 * part;
  const auto write = [&](const View& view, const float* from, float scale) {
    if (!view.given) return;
    visit_rows(sequence.key_row(view, head, 0), view.token, view.dtype, [&](auto to) {
      for (int64_t j = block; j < min(block + kReduceKeys, sequence.keys); ++j) {
        add_partials(w, from + j * w.padded_dim, 2 * part, scale, to[j]);
      }
    });
  };
  write(w.grad_key, partial, w.scale);
  write(w.grad_value, partial + part, 1.f);
}

int64_t backward_reduce_items(const BackwardWork& w) {
  return prompt_items(w) + gate_items(w) + sink_items(w) + w.num_sequences * w.num_heads_kv * key_blocks(w);
}

int64_t backward_reduce_scratch(const BackwardWork& w) {
  return w.wants_prompt() ? 2 * w.prompt_length * w.padded_dim * static_cast<int64_t>(sizeof(float)) : 0;
}

void backward_reduce_run(const BackwardWork& w, int64_t begin, int64_t end, void* scratch) {
  for (int64_t item = begin; item < end; ++item) {
    int64_t i = item;
    if (i < prompt_items(w)) {
      reduce_prompt(w, i / w.num_heads_kv, i % w.num_heads_kv, static_cast<float*>(scratch));
    } else if ((i -= prompt_items(w)) < gate_items(w)) {
      reduce_gates(w);
    } else if ((i -= gate_items(w)) < sink_items(w)) {
      reduce_sinks(w);
    } else {
      i -= sink_items(w);
      const int64_t pair = i / key_blocks(w);
      reduce_keys(w, pair / w.num_heads_kv, pair % w.num_heads_kv, i % key_blocks(w) * kReduceKeys);
    }
  }
}

}  // namespace
}  // namespace zinit::cpu
