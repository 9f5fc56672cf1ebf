// How one call of the cache function is cut into pieces of work. Plain C++: planned by the bindings, read by
// the kernels.
#pragma once
#include "kernels.h"

namespace zinit::cpu {

// An item is a block of query tokens of some KV heads of one sequence against one split of its keys; its rows
// are the query heads of a KV head times the tokens. With one split the item finishes its rows, otherwise it
// leaves (accumulator, maximum, sum) in `partials` and the combine stage merges them and adds the prompt
// branch.
struct DecodeWork : DecodeParams {
  int64_t query_block;  // tokens of an item, at most
  int64_t query_blocks;
  int64_t heads_per_item;  // KV heads walked together, key block by key block: reads a token-major cache in
                           // long runs
  int64_t head_blocks;
  int64_t splits;
  float* partials;  // [B, Hq, T, splits, partial_size(D)], nullptr with one split
};

constexpr int64_t kDecodeRows = 64;  // rows of one KV head in an item, at most, unless one token has more
constexpr int64_t kDecodeKeys = 64;  // keys of a block, at most
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kDecodePad = 16;  // rows in scratch are padded to the widest vector

constexpr int64_t partial_size(int64_t head_dim) {
  return (head_dim + kDecodePad - 1) / kDecodePad * kDecodePad + 2;
}

}  // namespace zinit::cpu
