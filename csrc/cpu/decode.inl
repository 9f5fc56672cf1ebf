// The cache function: queries against a KV cache, contiguous or paged. Included by the isa_*.cpp files.
//
// Decoding is bound by reading the cache once, so everything else is arranged around that read:
// - All query heads of a KV head and all tokens of a query block ("rows") meet a block of keys while it is in
// the L1
//   cache: its scores are computed for all rows first, its values added for all rows second.
// - Each of these two passes prefetches the rows that the next pass reads. The rows of a pass are known by
// address, one
//   by one: strides, pages and head order make no difference to the arithmetic.
#pragma once
#include "decode_append.inl"
#include "decode_items.inl"
#include "decode_tiles.inl"

namespace zinit::cpu {
namespace {

template <class T>
inline int64_t query_stride(int64_t padded) {
  return kPairs<T> ? padded + kDecodePad : padded;
}

template <class T>
inline const typename Dot<T>::Query* queries_of(const DecodeScratch& s, int64_t row, int64_t padded) {
  if constexpr (kPairs<T>) {
    return s.pairs + row * query_stride<T>(padded);
  } else {
    return s.query + row * padded;
  }
}

// The queries of one KV head into scratch, rotated and rounded to their dtype as a rotated tensor would be.
template <class T>
inline void load_queries(const DecodeWork& w, const QueryBlock& q, int64_t head, const DecodeScratch& s) {
  float row_of_query[kMaxHeadDim] = {};
  T rounded[kMaxHeadDim];
  for (int64_t row = 0; row < q.rows; ++row) {
    const int64_t h = (q.first_head + head) * q.group + row / q.tokens, t = q.token + row % q.tokens;
    load_row(static_cast<const T*>(row_pointer(w.query, q.b, h, t)), w.head_dim, row_of_query);
    if (w.rotary_cos) {
      rotate(w, w.cache_seqlens[q.b] + (w.rotate_by_token ? t : 0), row_of_query);
      store_columns(row_of_query, broadcast(1.f), w.head_dim, rounded);
      load_row(rounded, w.head_dim, row_of_query);
    }
    load_row(row_of_query, q.padded, s.query + (head * q.rows + row) * q.padded);
    if constexpr (kPairs<T>) {
      BFloat16* pairs = s.pairs + (head * q.rows + row) * query_stride<T>(q.padded);
      store_columns(row_of_query, broadcast(1.f), q.padded, pairs);
      __builtin_memset(pairs + q.padded, 0, kDecodePad * sizeof(BFloat16));
    }
  }
}

// A block of keys and values of one KV head. The addresses past `count` repeat the last key's.
struct KeyBlock {
  int64_t begin, count;
  RowAddress key[kDecodeKeys], value[kDecodeKeys];
};

inline void locate(const DecodeWork& w, const QueryBlock& q, int64_t head, Range keys, int64_t size,
                   KeyBlock& block) {
  block.begin = keys.begin;
  block.count = keys.end - keys.begin;
  const auto address = [&](const View& cache, int64_t key) {
    return static_cast<RowAddress>(cache_row(w, cache, q.b, q.first_head + head, key));
  };
  if (w.block_table) {
    for (int64_t j = 0; j < block.count; ++j) {
      block.key[j] = address(w.key_cache, keys.begin + j);
      block.value[j] = address(w.value_cache, keys.begin + j);
    }
  } else {
    const int64_t bytes = element_size(w.key_cache.dtype);
    const RowAddress key = address(w.key_cache, keys.begin);
    const RowAddress value = address(w.value_cache, keys.begin);
    for (int64_t j = 0; j < block.count; ++j) {
      block.key[j] = key + j * w.key_cache.token * bytes;
      block.value[j] = value + j * w.value_cache.token * bytes;
    }
  }
  for (int64_t j = block.count; j < size; ++j) {
    block.key[j] = block.key[block.count - 1];
    block.value[j] = block.value[block.count - 1];
  }
}

// Whether any of the N rows from `row` on sees a key of the block; hides from each row the keys it does not
// see.
template <int N>
inline bool mask_tile(const DecodeWork& w, const QueryBlock& q, int64_t row, const KeyBlock& block,
                      int64_t count, float* scores) {
  bool any = false;
  for (int r = 0; r < N; ++r) {
    const Range seen = visible_keys(w, q, q.token + (row + r) % q.tokens);
    const int64_t begin = seen.begin - block.begin, end = seen.end - block.begin;
    any |= begin < block.count && end > 0 && begin < end;
    if (scores == nullptr) continue;
    for (int64_t j = 0; j < begin && j < count; ++j) scores[j * N + r] = -kInfinity;
    for (int64_t j = end > 0 ? end : 0; j < count; ++j) scores[j * N + r] = -kInfinity;
  }
  return any;
}

// All rows of one KV head against one block of its keys. `coming`: the keys that are read next, anywhere.
template <class T>
inline void attend_block(const DecodeWork& w, const QueryBlock& q, int64_t head, const KeyBlock& block,
                         const RowAddress* coming, const DecodeScratch& s) {
  const int64_t count = round_up(block.count, kLanes), first_row = head * q.rows;
  const bool all_see_all = visible_keys(w, q, q.token).end >= block.begin + count &&
                           visible_keys(w, q, q.token + q.tokens - 1).begin <= block.begin;
  RunningSoftmax* states = s.states + head * tiles_of(q.rows);
  const RowAddress* ahead = block.value;
  for_each_tile(q.rows, [&]<int N>(TileOf<N>, int64_t row, int64_t tile) {
    if (!all_see_all && !mask_tile<N>(w, q, row, block, count, nullptr)) return;
    float* scores = s.scores + row * kDecodeKeys;
    score_keys<T, N>(block.key, count, w.head_dim, queries_of<T>(s, first_row + row, q.padded),
                     query_stride<T>(q.padded), w.scale * kLog2E, scores, ahead);
    ahead = nullptr;
    if (!all_see_all) mask_tile<N>(w, q, row, block, count, scores);
    absorb<N>(scores, count, states[tile], s.out + (first_row + row) * q.padded, q.padded, q.padded);
  });
  for_each_tile(q.rows, [&]<int N>(TileOf<N>, int64_t row, int64_t) {
    if (!all_see_all && !mask_tile<N>(w, q, row, block, count, nullptr)) return;
    float *weights = s.scores + row * kDecodeKeys, *out = s.out + (first_row + row) * q.padded;
    add_block_values<T, N>(block.value, block.count, w.head_dim, weights, out, q.padded, coming);
    coming = nullptr;
  });
}

// All rows of an item against all keys of its split: the KV heads inside a block of keys, so that a
// token-major cache is read in runs of heads_per_item rows.
template <class T>
inline void attend_keys(const DecodeWork& w, const QueryBlock& q, Range keys, const DecodeScratch& s) {
  if (keys.begin >= keys.end) return;
  const int64_t size = keys_per_block(w);
  const auto block_at = [&](int64_t begin) { return Range{begin, min(begin + size, keys.end)}; };
  KeyBlock blocks[2];
  int current = 0;
  locate(w, q, 0, block_at(keys.begin), size, blocks[current]);
  for (int64_t begin = keys.begin; begin < keys.end; begin += size) {
    for (int64_t head = 0; head < q.heads; ++head, current ^= 1) {
      const bool last_head = head + 1 == q.heads, last = last_head && begin + size >= keys.end;
      if (!last) {
        locate(w, q, last_head ? 0 : head + 1, block_at(last_head ? begin + size : begin), size,
               blocks[current ^ 1]);
      }
      attend_block<T>(w, q, head, blocks[current], last ? nullptr : blocks[current ^ 1].key, s);
    }
  }
}

// The prompt table of one KV head into scratch as padded float32 rows, whatever its dtype.
inline void load_prompts(const DecodeWork& w, const View& table, int64_t row, int64_t head, int64_t padded,
                         float* to) {
  visit_rows(row_pointer(table, row, head, 0), table.token, table.dtype, [&](auto rows) {
    for (int64_t j = 0; j < w.prompt_length; ++j, to += padded) {
      __builtin_memset(to + padded - kDecodePad, 0, kDecodePad * sizeof(float));
      load_row(rows[j], w.head_dim, to);
    }
  });
}

// out[r] += gate[r] * softmax(scale * query[r] . prompt_key) . prompt_value
template <int N>
inline void add_prompts(const DecodeWork& w, const float* query, int64_t padded, const float* gate,
                        float* out, const DecodeScratch& s) {
  RowAddress key[kMaxPromptLength], value[kMaxPromptLength];
  const int64_t count = round_up(w.prompt_length, kLanes);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t row = min(j, w.prompt_length - 1);
    key[j] = reinterpret_cast<RowAddress>(s.prompt_key + row * padded);
    value[j] = reinterpret_cast<RowAddress>(s.prompt_value + row * padded);
  }
  score_keys<float, N>(key, count, padded, query, padded, w.scale * kLog2E, s.scores, nullptr);
  for (int64_t i = w.prompt_length * N; i < count * N; ++i) s.scores[i] = -kInfinity;
  RunningSoftmax state;
  state.reset();
  absorb<N>(s.scores, count, state, nullptr, 0, 0);
  float factor[kLanes];
  for (int i = 0; i < kLanes; ++i) factor[i] = gate[i % N] / sum_of_row<N>(state, i % N);
  for (int64_t i = 0; i < count * N; i += kLanes) store(s.scores + i, load(factor) * load(s.scores + i));
  add_values<float, N>(value, w.prompt_length, padded, s.scores, out, padded, nullptr);
}

// Divides by the softmax's sum, adds the prompt branch, writes out and lse.
template <class T>
inline void finish(const DecodeWork& w, const QueryBlock& q, const DecodeScratch& s) {
  const Prompt prompt(w, q.b);
  for (int64_t head = 0; head < q.heads; ++head) {
    if (prompt.given()) {
      load_prompts(w, w.prompt_key, prompt.row, q.first_head + head, q.padded, s.prompt_key);
      load_prompts(w, w.prompt_value, prompt.row, q.first_head + head, q.padded, s.prompt_value);
    }
    const RunningSoftmax* states = s.states + head * tiles_of(q.rows);
    for_each_tile(q.rows, [&]<int N>(TileOf<N>, int64_t row, int64_t tile) {
      float* out = s.out + (head * q.rows + row) * q.padded;
      const float* query = s.query + (head * q.rows + row) * q.padded;
      float gate[N];
      bool all_open = true;
      for (int r = 0; r < N; ++r) {
        const int64_t h = (q.first_head + head) * q.group + (row + r) / q.tokens,
                      t = q.token + (row + r) % q.tokens;
        const float sum = sum_of_row<N>(states[tile], r), inverse = sum > 0 ? 1 / sum : sum;
        for (int64_t d = r * q.padded; d < (r + 1) * q.padded; d += kLanes) {
          store(out + d, broadcast(inverse) * load(out + d));
        }
        const float log_sum = (states[tile].max[r] + __builtin_log2f(sum)) * static_cast<float>(kLn2);
        w.lse[(q.b * w.num_heads_q + h) * w.seqlen_q + t] = sum == 0 ? -kInfinity : log_sum;
        gate[r] = prompt.gate(w, h);
        all_open = all_open && gate[r] != 0;
      }
      // A closed gate leaves its row untouched, to the bit: 0 * prompts could turn -0 into 0, or be NaN.
      if (all_open) {
        add_prompts<N>(w, query, q.padded, gate, out, s);
      } else {
        for (int r = 0; r < N; ++r) {
          if (gate[r] != 0)
            add_prompts<1>(w, query + r * q.padded, q.padded, gate + r, out + r * q.padded, s);
        }
      }
      for (int r = 0; r < N; ++r) {
        const int64_t h = (q.first_head + head) * q.group + (row + r) / q.tokens,
                      t = q.token + (row + r) % q.tokens;
        store_columns(out + r * q.padded, broadcast(1.f), w.head_dim,
                      static_cast<T*>(row_pointer(w.out, q.b, h, t)));
      }
    });
  }
}

inline float* partial_of(const DecodeWork& w, const QueryBlock& q, int64_t head, int64_t row, int64_t split) {
  const int64_t h = (q.first_head + head) * q.group + row / q.tokens, t = q.token + row % q.tokens;
  const int64_t index = ((q.b * w.num_heads_q + h) * w.seqlen_q + t) * w.splits + split;
  return w.partials + index * partial_size(w.head_dim);
}

inline void save_partials(const DecodeWork& w, const QueryBlock& q, int64_t split, const DecodeScratch& s) {
  for (int64_t head = 0; head < q.heads; ++head) {
    for_each_tile(q.rows, [&]<int N>(TileOf<N>, int64_t row, int64_t tile) {
      const RunningSoftmax& state = s.states[head * tiles_of(q.rows) + tile];
      for (int r = 0; r < N; ++r) {
        float* partial = partial_of(w, q, head, row + r, split);
        load_row(s.out + (head * q.rows + row + r) * q.padded, q.padded, partial);
        partial[q.padded] = state.max[r];
        partial[q.padded + 1] = sum_of_row<N>(state, r);
      }
    });
  }
}

// The exact merge of softmaxes over disjoint keys, in the order of the splits.
inline void merge_partials(const DecodeWork& w, const QueryBlock& q, const DecodeScratch& s) {
  for (int64_t head = 0; head < q.heads; ++head) {
    for_each_tile(q.rows, [&]<int N>(TileOf<N>, int64_t row, int64_t tile) {
      RunningSoftmax& state = s.states[head * tiles_of(q.rows) + tile];
      state.reset();
      for (int r = 0; r < N; ++r) {
        const float* partial = partial_of(w, q, head, row + r, 0);
        const int64_t stride = partial_size(w.head_dim);
        float* out = s.out + (head * q.rows + row + r) * q.padded;
        float top = -kInfinity;
        for (int64_t i = 0; i < w.splits; ++i) {
          const float max = partial[i * stride + q.padded];
          top = max > top ? max : top;
        }
        for (int i = r; i < kLanes; i += N) state.max[i] = top;
        __builtin_memset(out, 0, static_cast<uint64_t>(q.padded) * sizeof(float));
        for (int64_t i = 0; i < w.splits; ++i, partial += stride) {
          const Vec weight = exp2_clamped(broadcast(partial[q.padded]) - finite_pivot(broadcast(top)));
          float lanes[kLanes];
          store(lanes, weight * broadcast(partial[q.padded + 1]));
          state.sum[r] += lanes[0];
          for (int64_t d = 0; d < q.padded; d += kLanes)
            store(out + d, fma(weight, load(partial + d), load(out + d)));
        }
      }
    });
  }
}

// An item is a query block against one split of its keys.
inline int64_t attend_items(const DecodeWork& w) {
  return w.num_sequences * w.query_blocks * w.head_blocks * w.splits;
}

template <class T>
inline void attend(const DecodeWork& w, int64_t begin, int64_t end, void* memory) {
  const DecodeScratch s = carve_scratch(w, memory);
  for (int64_t item = begin; item < end; ++item) {
    const QueryBlock q = query_block_of(w, item / w.splits, w.heads_per_item);
    for (int64_t head = 0; head < q.heads; ++head) load_queries<T>(w, q, head, s);
    __builtin_memset(s.out, 0, static_cast<uint64_t>(q.heads * q.rows * q.padded) * sizeof(float));
    for (int64_t i = 0; i < q.heads * tiles_of(q.rows); ++i) s.states[i].reset();
    attend_keys<T>(w, q, keys_of_split(w, q, item % w.splits), s);
    if (w.splits == 1) {
      finish<T>(w, q, s);
    } else {
      save_partials(w, q, item % w.splits, s);
    }
  }
}

// An item is a query block of one KV head, however many are walked together: with 8 heads to an item two
// splits would leave one thread to combine and to add all prompts (prompt on / off 1.08 to 1.19).
inline int64_t combine_items(const DecodeWork& w) {
  return w.splits == 1 ? 0 : w.num_sequences * w.query_blocks * w.num_heads_kv;
}

template <class T>
inline void combine(const DecodeWork& w, int64_t begin, int64_t end, void* memory) {
  const DecodeScratch s = carve_scratch(w, memory);
  for (int64_t item = begin; item < end; ++item) {
    const QueryBlock q = query_block_of(w, item, 1);
    for (int64_t head = 0; head < q.heads; ++head) load_queries<T>(w, q, head, s);
    merge_partials(w, q, s);
    finish<T>(w, q, s);
  }
}

// run<T> of a stage for the dtype of the call.
template <void (*kFloat32)(const DecodeWork&, int64_t, int64_t, void*),
          void (*kBFloat16)(const DecodeWork&, int64_t, int64_t, void*),
          void (*kFloat16)(const DecodeWork&, int64_t, int64_t, void*)>
inline void by_dtype(const DecodeWork& w, int64_t begin, int64_t end, void* memory) {
  switch (w.query.dtype) {
    case DType::kFloat32:
      return kFloat32(w, begin, end, memory);
    case DType::kBFloat16:
      return kBFloat16(w, begin, end, memory);
    case DType::kFloat16:
      return kFloat16(w, begin, end, memory);
  }
}

inline int64_t no_scratch(const DecodeWork&) { return 0; }
inline int64_t decode_scratch(const DecodeWork& w) { return carve_scratch(w, nullptr).bytes; }

constexpr Stage<DecodeWork> kAppendStage = {append_items, no_scratch,
                                            by_dtype<append<float>, append<BFloat16>, append<Float16>>};
constexpr Stage<DecodeWork> kAttendStage = {attend_items, decode_scratch,
                                            by_dtype<attend<float>, attend<BFloat16>, attend<Float16>>};
constexpr Stage<DecodeWork> kCombineStage = {combine_items, decode_scratch,
                                             by_dtype<combine<float>, combine<BFloat16>, combine<Float16>>};

}  // namespace
}  // namespace zinit::cpu
