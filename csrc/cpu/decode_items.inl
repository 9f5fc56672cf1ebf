// Which rows and keys an item of decoding owns, and where it keeps them.
#pragma once
#include "decode_tiles.inl"
#include "decode_work.h"
#include "prompt.inl"

namespace zinit::cpu {
namespace {

// The part of an item that its splits share: a block of query tokens of one sequence.
struct QueryBlock {
  int64_t b, token, tokens;   // sequence, first token and number of tokens
  int64_t first_head, heads;  // KV heads
  int64_t group, rows;        // query heads of a KV head; rows = group * tokens, token fastest
  int64_t total;              // keys in the cache after the append
  int64_t padded;             // row stride in scratch
};

inline QueryBlock query_block_of(const DecodeWork& w, int64_t index, int64_t heads_per_item) {
  const int64_t head_blocks = ceil_div(w.num_heads_kv, heads_per_item);
  QueryBlock q;
  q.first_head = index % head_blocks * heads_per_item;
  q.heads = min(w.num_heads_kv - q.first_head, heads_per_item);
  q.token = index / head_blocks % w.query_blocks * w.query_block;
  q.tokens = min(w.seqlen_q - q.token, w.query_block);
  q.b = index / head_blocks / w.query_blocks;
  q.group = w.num_heads_q / w.num_heads_kv;
  q.rows = q.group * q.tokens;
  q.total = w.cache_seqlens[q.b] + (w.new_key.data ? w.seqlen_new : 0);
  q.padded = round_up(w.head_dim, kDecodePad);
  return q;
}

// Keys that token `t` of the call sees.
inline Range visible_keys(const DecodeWork& w, const QueryBlock& q, int64_t t) {
  const int64_t position = q.total - w.seqlen_q + t;
  const int64_t begin = w.window_left < 0 ? 0 : max(0, position - w.window_left);
  const int64_t end = w.window_right < 0 ? q.total : min(q.total, position + w.window_right + 1);
  return {begin, max(begin, end)};
}

// Keys of one split of everything the block sees; in whole vectors, so that only the last is ragged.
inline Range keys_of_split(const DecodeWork& w, const QueryBlock& q, int64_t split) {
  const Range first = visible_keys(w, q, q.token), last = visible_keys(w, q, q.token + q.tokens - 1);
  const int64_t begin = first.begin, end = max(begin, last.end);
  const int64_t share = round_up(ceil_div(end - begin, w.splits), kDecodePad);
  return {min(begin + split * share, end), min(begin + (split + 1) * share, end)};
}

// 16 KiB of keys: they stay in the level 1 cache while the tiles of an item pass over them.
inline int64_t keys_per_block(const DecodeWork& w) {
  const int64_t keys = 16384 / (w.head_dim * element_size(w.query.dtype)) / 16 * 16;
  return max(16, min(keys, kDecodeKeys));
}

// Where everything of an item lies in its thread's scratch.
struct DecodeScratch {
  float* query;       // [heads, rows, padded], rotated, in the query's precision
  BFloat16* pairs;    // the same as bfloat16, where Dot wants it
  float* out;         // [heads, rows, padded]
  float* scores;      // [rows, kDecodeKeys], tile by tile
  float* prompt_key;  // [P, padded]
  float* prompt_value;
  RunningSoftmax* states;  // [heads, tiles]
  int64_t bytes;
};

inline DecodeScratch carve_scratch(const DecodeWork& w, void* memory) {
  const int64_t padded = round_up(w.head_dim, kDecodePad), group = w.num_heads_q / w.num_heads_kv;
  const int64_t rows = group * w.query_block, all_rows = w.heads_per_item * rows;
  Arena arena{static_cast<char*>(memory)};
  DecodeScratch s;
  s.query = arena.take<float>(all_rows * padded);
  s.pairs = arena.take<BFloat16>(all_rows * (padded + kDecodePad));
  s.out = arena.take<float>(all_rows * padded);
  s.scores = arena.take<float>(max(rows * kDecodeKeys, kTileRows * kMaxPromptLength));
  s.prompt_key = arena.take<float>(w.prompt_length * padded);
  s.prompt_value = arena.take<float>(w.prompt_length * padded);
  s.states = arena.take<RunningSoftmax>(w.heads_per_item * tiles_of(rows));
  s.bytes = arena.used;
  return s;
}

}  // namespace
}  // namespace zinit::cpu
