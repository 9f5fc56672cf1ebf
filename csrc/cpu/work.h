// What the kernels of backward and decode read beside their parameters: how the call is cut into pieces.
// plan.h fills it in; the kernels only read it. Plain C++.
#pragma once
#include <cstdint>

#include "../params.h"

namespace zinit::cpu {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxPromptLength = 128;

// How backward is cut into pieces. What is summed, and in which order, depends on the shapes alone, so the
// gradients have the same bits for any number of threads.
//
// A pass is one block of queries of one query head. A split is some of the passes of a key head, for one
// sequence. It owns the gradients of its queries, and makes a partial gradient of its keys and of its prompt
// row. A unit of work is one split, and the second stage sums the partials in order; or it is all splits of a
// key head in turn, summed in the same order as they are made.
struct BackwardWork : BackwardParams {
  int64_t block_queries;   // queries of a pass, at most
  int64_t blocks;          // blocks of queries in the longest sequence
  int64_t splits;          // of a sequence and key head
  bool in_turn;            // a unit takes all splits of a key head
  int64_t padded_dim;      // D rounded up to 16
  float* key_partials;     // [B, Hkv, splits, 2, S, padded_dim], dK and dV; only where stores_partials()
  float* prompt_partials;  // [B, Hkv, splits, 2, P, padded_dim]; only where wants_prompt()
  float* gate_partials;    // [B, Hq, blocks]
  float* sink_partials;    // [B, Hq, blocks]; only where grad_sinks is given

  bool wants_keys() const { return grad_key.given || grad_value.given; }
  bool wants_tokens() const { return grad_query.given || wants_keys(); }
  bool wants_prompt() const { return grad_prompt_key.given || grad_prompt_value.given; }
  bool stores_partials() const { return wants_keys() && !in_turn; }
  int64_t units() const { return in_turn ? 1 : splits; }  // of a sequence and key head
};

// How one call of the cache function is cut into pieces. An item is a block of query tokens of some key heads
// of one sequence, against one split of its keys. Its rows are the query heads of a key head times its
// tokens. With one split the item finishes its rows. Otherwise it leaves (acc, m, l) of each row in
// `partials`, and the combining stage merges them and adds the prompt branch.
struct DecodeWork : DecodeParams {
  int64_t query_block;   // tokens of an item, at most
  int64_t query_blocks;  // of a sequence
  // Key heads walked together, block by block of keys: a token-major cache is then read in long runs.
  int64_t heads_per_item;
  int64_t head_blocks;  // of a sequence
  int64_t splits;
  float* partials;  // [B, Hq, T, splits, partial_size(D)]; only with more than one split
};

constexpr int64_t kDecodeRows = 64;  // rows of one key head in an item, at most, unless one token has more
constexpr int64_t kDecodeKeys = 64;  // keys of a block, at most
constexpr int64_t kDecodePad = 16;   // rows in scratch are padded to the widest vector

constexpr int64_t partial_size(int64_t head_dim) {
  return (head_dim + kDecodePad - 1) / kDecodePad * kDecodePad + 2;
}

}  // namespace zinit::cpu
