// How a call is cut into pieces: pure functions of shapes and of the number of threads, without torch.
#pragma once
#include <algorithm>

#include "linear_work.h"
#include "work.h"

namespace zinit::cpu {

// The share of the threads' time that has work, if all items cost the same.
inline double busy_share(int64_t items, int64_t threads) {
  const int64_t rounds = (items + threads - 1) / threads;
  return static_cast<double>(items) / static_cast<double>(rounds * threads);
}

// Everything of BackwardWork but its workspace.
inline void plan_backward(BackwardWork& w, int64_t threads) {
  constexpr int64_t kSplits = 32;  // at least as many in all, so that few heads still occupy many threads
  w.padded_dim = (w.head_dim + 15) / 16 * 16;
  w.block_queries = 256;
  const auto blocks = [&] { return (w.seqlen_q + w.block_queries - 1) / w.block_queries; };
  while (w.block_queries > 64 && w.num_sequences * w.num_heads_q * blocks() < kSplits) w.block_queries /= 2;
  w.blocks = blocks();
  const int64_t pairs = w.num_sequences * w.num_heads_kv;
  const int64_t passes = w.num_heads_q / w.num_heads_kv * w.blocks;
  w.splits = pairs == 0 ? 1 : std::max<int64_t>(1, std::min(passes, (kSplits + pairs - 1) / pairs));
  // Without partials in memory backward of 32/8 heads takes 6 to 10 % less (T = 512 and 2048, Zen 5).
  w.in_turn =
      w.splits == 1 || pairs >= 4 * threads || (!w.cu_seqlens_q.given && busy_share(pairs, threads) > 0.9);
}

struct BackwardWorkspace {
  int64_t key_floats, prompt_floats, gate_floats, sink_floats;

  explicit BackwardWorkspace(const BackwardWork& w) {
    const int64_t splits = w.num_sequences * w.num_heads_kv * w.splits;
    key_floats = w.stores_partials() ? splits * 2 * w.seqlen_k * w.padded_dim : 0;
    prompt_floats = w.wants_prompt() ? splits * 2 * w.prompt_length * w.padded_dim : 0;
    gate_floats = w.num_sequences * w.num_heads_q * w.blocks;
    sink_floats = w.grad_sinks.given ? gate_floats : 0;
  }
  int64_t floats() const { return key_floats + prompt_floats + gate_floats + sink_floats; }
  void give_to(BackwardWork& w, float* memory) const {
    w.key_partials = memory;
    w.prompt_partials = memory + key_floats;
    w.gate_partials = memory + key_floats + prompt_floats;
    w.sink_partials = memory + key_floats + prompt_floats + gate_floats;
  }
};

// Everything of DecodeWork but its partials: items of nearly equal number for every thread. Keys are split
// only where sequences and heads are too few. `longest`: keys of the longest sequence after the append.
inline void plan_decode(DecodeWork& w, int64_t longest, int64_t threads) {
  constexpr int64_t kRunBytes = 4096;       // of a token-major cache, read in one piece
  constexpr int64_t kStateBytes = 1 << 18;  // queries and acc of an item: at most half of a level 2 cache
  constexpr int64_t kKeysWorthASplit = 256;
  const int64_t group = w.num_heads_q / w.num_heads_kv;
  w.query_block = std::clamp<int64_t>(kDecodeRows / group, 1, std::max<int64_t>(w.seqlen_q, 1));
  w.query_blocks = (w.seqlen_q + w.query_block - 1) / w.query_block;
  w.heads_per_item = 1;
  if (w.key_cache.head < w.key_cache.token) {
    const int64_t row_bytes = w.head_dim * size_of(w.query.dtype);
    const int64_t head_state = group * w.query_block * partial_size(w.head_dim) * 8;
    w.heads_per_item = std::min((kRunBytes + row_bytes - 1) / row_bytes, kStateBytes / head_state);
    w.heads_per_item = std::clamp<int64_t>(w.heads_per_item, 1, w.num_heads_kv);
  }
  w.head_blocks = (w.num_heads_kv + w.heads_per_item - 1) / w.heads_per_item;

  const int64_t most = std::max<int64_t>(longest / kKeysWorthASplit, 1);
  const int64_t blocks = w.num_sequences * w.query_blocks * w.head_blocks;
  w.splits = std::clamp<int64_t>(w.num_splits, 1, std::max<int64_t>(longest, 1));
  if (w.num_splits == 0) {
    while (w.splits < most && busy_share(blocks * w.splits, threads) < 0.9) ++w.splits;
  }
}

// Floats between the splits and their combination.
inline int64_t decode_partial_floats(const DecodeWork& w) {
  return w.splits == 1 ? 0
                       : w.num_sequences * w.num_heads_q * w.seqlen_q * w.splits * partial_size(w.head_dim);
}

// Products of many rows. Laying out 48 rows of a weight for a block of 512 costs 1 % of the product. Items are few then,
// so blocks are smaller where threads would have less than four.
inline ManyWork plan_many(const LinearWork& linear, int64_t threads) {
  ManyWork w{linear, 512};
  const auto items = [&] {
    int64_t panels = 0;
    for (int i = 0; i < (w.gated ? 1 : w.num_weights); ++i) panels += (w.weights[i].rows + 47) / 48;
    return (w.num_rows + w.block - 1) / w.block * panels;
  };
  while (w.block > 32 && items() < 4 * threads) w.block /= 2;
  return w;
}

}  // namespace zinit::cpu
