// Which rows and keys an item of decoding owns, and where it keeps them.
#pragma once
#include "decode_tiles.h"
#include "gemm.h"
#include "sequence.h"
#include "work.h"

namespace zinit::cpu {
namespace {

// The part of an item that its splits share: a block of query tokens of one sequence.
struct QueryBlock {
  int64_t b, token, tokens;   // sequence, first token and number of tokens
  int64_t first_head, heads;  // key heads
  int64_t group, rows;        // query heads of a key head; rows = group * tokens, token fastest
  int64_t total;              // keys in the cache after the append
  int64_t hidden;             // the first of them, which nothing sees
  int64_t padded;             // row stride in scratch

  QueryBlock(const DecodeWork& w, int64_t index, int64_t heads_per_item) {
    const int64_t head_blocks = ceil_div(w.num_heads_kv, heads_per_item);
    first_head = index % head_blocks * heads_per_item;
    heads = min(w.num_heads_kv - first_head, heads_per_item);
    token = index / head_blocks % w.query_blocks * w.query_block;
    tokens = min(w.seqlen_q - token, w.query_block);
    b = index / head_blocks / w.query_blocks;
    group = w.num_heads_q / w.num_heads_kv;
    rows = group * tokens;
    total = w.cache_seqlens.data[b] + w.seqlen_new;
    hidden = w.cache_leftpad.given ? w.cache_leftpad.data[b] : 0;
    padded = round_up(w.head_dim, kDecodePad);
  }

  // Token i of the block alone.
  QueryBlock one_token(int64_t i) const {
    QueryBlock one = *this;
    one.token = token + i, one.tokens = 1, one.rows = group;
    return one;
  }

  // The query head and the token of a row of key head `head` of the block.
  int64_t head_of(int64_t head, int64_t row) const { return (first_head + head) * group + row / tokens; }
  int64_t token_of(int64_t row) const { return token + row % tokens; }

  // Keys that token `t` of the call sees.
  Range visible(const DecodeWork& w, int64_t t) const {
    const int64_t position = total - w.seqlen_q + t;
    const int64_t begin = w.window_left < 0 ? hidden : max(hidden, position - w.window_left);
    const int64_t end = w.window_right < 0 ? total : min(total, position + w.window_right + 1);
    return {begin, max(begin, end)};
  }

  // Keys of one split of everything that the block sees; in whole vectors, so that only the last is ragged.
  Range keys_of_split(const DecodeWork& w, int64_t split) const {
    const int64_t begin = visible(w, token).begin, end = max(begin, visible(w, token + tokens - 1).end);
    const int64_t share = round_up(ceil_div(end - begin, w.splits), kDecodePad);
    return {min(begin + split * share, end), min(begin + (split + 1) * share, end)};
  }
};

// 16 KiB of keys: they stay in the level 1 cache while the tiles of an item pass over them.
inline int64_t keys_per_block(const DecodeWork& w) {
  const int64_t keys = 16384 / (w.head_dim * size_of(w.query.dtype)) / 16 * 16;
  return max(16, min(keys, kDecodeKeys));
}

// Where everything of an item lies in its thread's scratch.
struct DecodeScratch {
  float* query;       // [heads, rows, padded], rotated, in the query's precision
  BFloat16* pairs;    // the same as bfloat16, where Dot wants it
  float* acc;         // [heads, rows, padded]; in the end the rows of the result
  float* scores;      // [rows, kDecodeKeys], tile by tile; then p
  float* prompt_key;  // [P, padded]
  float* prompt_value;
  RunningSoftmax* states;  // [heads, tiles]
  int64_t bytes;

  DecodeScratch(const DecodeWork& w, void* memory) {
    const int64_t padded = round_up(w.head_dim, kDecodePad), group = w.num_heads_q / w.num_heads_kv;
    const int64_t rows = group * w.query_block, all_rows = w.heads_per_item * rows;
    Arena arena{static_cast<char*>(memory)};
    query = arena.take<float>(all_rows * padded);
    pairs = arena.take<BFloat16>(all_rows * (padded + kDecodePad));
    acc = arena.take<float>(all_rows * padded);
    scores = arena.take<float>(max(rows * kDecodeKeys, kTileRows * kMaxPromptLength));
    prompt_key = arena.take<float>(w.prompt_length * padded);
    prompt_value = arena.take<float>(w.prompt_length * padded);
    states = arena.take<RunningSoftmax>(w.heads_per_item * tiles_of(rows));
    bytes = arena.used;
  }
};

}  // namespace
}  // namespace zinit::cpu
