// The cache function: queries against a KV cache, contiguous or paged.
//
// Decoding is bound by reading the cache once, so everything else is arranged around that read:
// - All query heads of a key head and all tokens of a query block ("rows") meet a block of keys while it is
//   in the L1 cache. Its scores are computed for all rows first, its values added for all rows second.
// - Each of these two passes prefetches the rows that the next pass reads. The rows of a pass are known by
//   their addresses, one by one: strides, pages and the order of heads make no difference to the arithmetic.
#pragma once
#include "decode_append.h"
#include "decode_items.h"
#include "decode_tiles.h"
#include "kernels.h"
#include "softcap.h"
#include "softmax.h"
#include "special.h"

namespace zinit::cpu {
namespace {

// A block of keys and values of one key head. The addresses past `count` repeat the last key, whose score is
// then masked, and a value of zeros: its weight 0 times inf would be NaN.
struct KeyBlock {
  int64_t begin, count;
  RowAddress key[kDecodeKeys], value[kDecodeKeys];
};

alignas(64) constexpr char kZeroRow[kMaxHeadDim * 4] = {};

// An item of the attending stage, or of the combining one.
template <class T, bool kFloats>
class DecodeItem {
  using KeyDot = Dot<T, kFloats>;
  using Query = typename KeyDot::Query;

 public:
  DecodeItem(const DecodeWork& work, const QueryBlock& block, void* memory)
      : w(work), s(work, memory), q(block), query_stride(KeyDot::kPairs ? q.padded + kDecodePad : q.padded) {}

  // The queries against `keys`: acc and the states of all rows.
  void attend(Range keys) {
    load_queries();
    clear(s.acc, q.heads * q.rows * q.padded);
    for (int64_t i = 0; i < q.heads * tiles_of(q.rows); ++i) s.states[i].reset();
    attend_keys(keys);
  }

  // Whether a hidden value can have reached acc (special.h). A single token sees all keys that it meets.
  bool may_leak() const {
    if (q.tokens == 1) return false;
    Extremes<false> seen;
    for (int64_t d = 0; d < w.head_dim; d += kLanes) note_columns(0, q.heads, d, seen);
    return !seen.is_finite();
  }

  // Whether values of `keys` that vdpbf16ps counts as 0 can have changed acc. Looks at the columns that are
  // so small: a head dimension may be padded with zeros.
  bool may_flush(Range keys) const {
    if constexpr (KeyDot::kPairs) {
      for (int64_t head = 0; head < q.heads; ++head) {
        for (int64_t d = 0; d < w.head_dim; d += kLanes) {
          Extremes<true> seen;
          note_columns(head, head + 1, d, seen);
          if (!seen.has_tiny()) continue;
          for (int64_t j = keys.begin; j < keys.end; ++j) {
            T* value = static_cast<T*>(cache_row(w, w.value_cache, q.b, q.first_head + head, j));
            if (has_tiny(Rows<T>{value + d, 0}, 1, min(kLanes, w.head_dim - d))) return true;
          }
        }
      }
    }
    return false;
  }

  // After `attend`: the rows of the result, or (acc, m, l) of every row where this is one split of several.
  void complete(int64_t split) {
    if (w.splits == 1) {
      write_results();
    } else {
      save_partials(split);
    }
  }

  // All splits: rows of the result.
  void combine() {
    load_queries();
    merge_partials();
    write_results();
  }

 private:
  float* acc_of(int64_t head, int64_t row) const { return s.acc + (head * q.rows + row) * q.padded; }
  const float* query_of(int64_t head, int64_t row) const {
    return s.query + (head * q.rows + row) * q.padded;
  }
  // As the scores want it.
  const Query* operand_of(int64_t head, int64_t row) const {
    if constexpr (KeyDot::kPairs) {
      return s.pairs + (head * q.rows + row) * query_stride;
    } else {
      return query_of(head, row);
    }
  }

  // The queries into scratch, rotated, and rounded to their dtype as a rotated tensor would be.
  void load_queries() {
    float row_of_query[kMaxHeadDim] = {};
    T rounded[kMaxHeadDim];
    for (int64_t head = 0; head < q.heads; ++head) {
      for (int64_t row = 0; row < q.rows; ++row) {
        const int64_t h = q.head_of(head, row), t = q.token_of(row), i = head * q.rows + row;
        load_row(static_cast<const T*>(row_pointer(w.query, q.b, h, t)), w.head_dim, row_of_query);
        if (w.rotary.given) {
          rotate(w.rotary, w.cache_seqlens.data[q.b] + (w.rotary.by_token ? t : 0), row_of_query);
          store_columns(row_of_query, broadcast(1.f), w.head_dim, rounded);
          load_row(rounded, w.head_dim, row_of_query);
        }
        load_row(row_of_query, q.padded, s.query + i * q.padded);
        if constexpr (KeyDot::kPairs) {
          KeyDot::store_query(row_of_query, q.padded, s.pairs + i * query_stride);
        }
      }
    }
  }

  void locate(int64_t head, Range keys, int64_t size, KeyBlock& block) const {
    block.begin = keys.begin;
    block.count = keys.end - keys.begin;
    const auto address = [&](const View& cache, int64_t key) {
      return static_cast<RowAddress>(cache_row(w, cache, q.b, q.first_head + head, key));
    };
    if (w.block_table.given) {
      for (int64_t j = 0; j < block.count; ++j) {
        block.key[j] = address(w.key_cache, keys.begin + j);
        block.value[j] = address(w.value_cache, keys.begin + j);
      }
    } else {
      const int64_t bytes = size_of(w.key_cache.dtype);
      const RowAddress key = address(w.key_cache, keys.begin);
      const RowAddress value = address(w.value_cache, keys.begin);
      for (int64_t j = 0; j < block.count; ++j) {
        block.key[j] = key + j * w.key_cache.token * bytes;
        block.value[j] = value + j * w.value_cache.token * bytes;
      }
    }
    for (int64_t j = block.count; j < size; ++j) {
      block.key[j] = block.key[block.count - 1];
      block.value[j] = kZeroRow;
    }
  }

  // Whether any of the N rows from `row` on sees a key of the block.
  template <int N>
  bool sees_some(int64_t row, const KeyBlock& block) const {
    for (int r = 0; r < N; ++r) {
      const Range seen = q.visible(w, q.token_of(row + r));
      const int64_t begin = seen.begin - block.begin, end = seen.end - block.begin;
      if (begin < block.count && end > 0 && begin < end) return true;
    }
    return false;
  }

  // Hides from each of the N rows the keys that it does not see.
  template <int N>
  void mask_tile(int64_t row, const KeyBlock& block, int64_t count, float* scores) const {
    for (int r = 0; r < N; ++r) {
      const Range seen = q.visible(w, q.token_of(row + r));
      const int64_t begin = seen.begin - block.begin, end = seen.end - block.begin;
      for (int64_t j = 0; j < begin && j < count; ++j) scores[j * N + r] = -kInfinity;
      for (int64_t j = end > 0 ? end : 0; j < count; ++j) scores[j * N + r] = -kInfinity;
    }
  }

  // The scores count log2(e) times here.
  template <int N>
  void cap_tile(float* scores, int64_t count) const {
    if (w.softcap > 0.f) {
      cap_scores(0, count * N / kLanes, 1.f, w.softcap * kLog2E, scores, kLanes, nullptr);
    }
  }

  // All rows of one key head against one block of its keys. `coming`: the keys that are read next, anywhere.
  void attend_block(int64_t head, const KeyBlock& block, const RowAddress* coming) {
    const int64_t count = round_up(block.count, kLanes);
    const bool all_see_all = q.visible(w, q.token).end >= block.begin + count &&
                             q.visible(w, q.token + q.tokens - 1).begin <= block.begin;
    RunningSoftmax* states = s.states + head * tiles_of(q.rows);
    const RowAddress* ahead = block.value;
    for_each_tile(q.rows, [&]<int N>(TileOf<N>, int64_t row, int64_t tile) {
      if (!all_see_all && !sees_some<N>(row, block)) return;
      float* scores = s.scores + row * kDecodeKeys;
      score_keys<T, kFloats, N>(block.key, count, w.head_dim, operand_of(head, row), query_stride,
                                w.scale * kLog2E, scores, ahead);
      cap_tile<N>(scores, count);
      ahead = nullptr;
      if (!all_see_all) mask_tile<N>(row, block, count, scores);
      absorb<N>(scores, count, states[tile], acc_of(head, row), q.padded, q.padded);
    });
    for_each_tile(q.rows, [&]<int N>(TileOf<N>, int64_t row, int64_t) {
      if (!all_see_all && !sees_some<N>(row, block)) return;
      add_block_values<T, kFloats, N>(block.value, block.count, w.head_dim, s.scores + row * kDecodeKeys,
                                      acc_of(head, row), q.padded, coming);
      coming = nullptr;
    });
  }

  // The key heads inside a block of keys, so that a token-major cache is read in runs of heads_per_item rows.
  void attend_keys(Range keys) {
    if (keys.begin >= keys.end) return;
    const int64_t size = keys_per_block(w);
    const auto block_at = [&](int64_t begin) { return Range{begin, min(begin + size, keys.end)}; };
    KeyBlock blocks[2];
    int current = 0;
    locate(0, block_at(keys.begin), size, blocks[current]);
    for (int64_t begin = keys.begin; begin < keys.end; begin += size) {
      for (int64_t head = 0; head < q.heads; ++head, current ^= 1) {
        const bool last_head = head + 1 == q.heads, last = last_head && begin + size >= keys.end;
        if (!last) {
          locate(last_head ? 0 : head + 1, block_at(last_head ? begin + size : begin), size,
                 blocks[current ^ 1]);
        }
        attend_block(head, blocks[current], last ? nullptr : blocks[current ^ 1].key);
      }
    }
  }

  // Columns d .. d + kLanes of acc, of all rows of some key heads.
  template <bool kSeesTiny>
  void note_columns(int64_t head, int64_t end, int64_t d, Extremes<kSeesTiny>& seen) const {
    for (int64_t i = head * q.rows; i < end * q.rows; ++i) {
      const Vec x = load(s.acc + i * q.padded + d);
      if (d + kLanes <= w.head_dim) {
        seen.note(x);
      } else {
        seen.note_first(x, w.head_dim - d);
      }
    }
  }

  float* partial_of(int64_t head, int64_t row, int64_t split) const {
    const int64_t h = q.head_of(head, row), t = q.token_of(row);
    const int64_t index = ((q.b * w.num_heads_q + h) * w.seqlen_q + t) * w.splits + split;
    return w.partials + index * partial_size(w.head_dim);
  }

  void save_partials(int64_t split) const {
    for (int64_t head = 0; head < q.heads; ++head) {
      for_each_tile(q.rows, [&]<int N>(TileOf<N>, int64_t row, int64_t tile) {
        const RunningSoftmax& state = s.states[head * tiles_of(q.rows) + tile];
        for (int r = 0; r < N; ++r) {
          float* partial = partial_of(head, row + r, split);
          load_row(acc_of(head, row + r), q.padded, partial);
          partial[q.padded] = state.m[r];
          partial[q.padded + 1] = sum_of_row<N>(state, r);
        }
      });
    }
  }

  // The exact merge of softmaxes over disjoint keys, in the order of the splits.
  void merge_partials() {
    for (int64_t head = 0; head < q.heads; ++head) {
      for_each_tile(q.rows, [&]<int N>(TileOf<N>, int64_t row, int64_t tile) {
        RunningSoftmax& state = s.states[head * tiles_of(q.rows) + tile];
        state.reset();
        for (int r = 0; r < N; ++r) {
          const float* partial = partial_of(head, row + r, 0);
          const int64_t stride = partial_size(w.head_dim);
          float* acc = acc_of(head, row + r);
          float m = -kInfinity;
          for (int64_t i = 0; i < w.splits; ++i) {
            const float m_split = partial[i * stride + q.padded];
            m = m_split > m ? m_split : m;
          }
          for (int i = r; i < kLanes; i += N) state.m[i] = m;
          clear(acc, q.padded);
          for (int64_t i = 0; i < w.splits; ++i, partial += stride) {
            const Vec alpha = exp2_clamped(broadcast(partial[q.padded]) - finite_pivot(broadcast(m)));
            float lanes[kLanes];
            store(lanes, alpha * broadcast(partial[q.padded + 1]));
            state.l[r] += lanes[0];
            for (int64_t d = 0; d < q.padded; d += kLanes) {
              store(acc + d, fma(alpha, load(partial + d), load(acc + d)));
            }
          }
        }
      });
    }
  }

  // The prompt table of one key head into scratch as padded float32 rows, whatever its dtype.
  void load_prompts(const View& table, int64_t row, int64_t head, float* to) const {
    visit_rows(row_pointer(table, row, head, 0), table.token, table.dtype, [&](auto rows) {
      for (int64_t j = 0; j < w.prompt_length; ++j, to += q.padded) {
        clear(to + q.padded - kDecodePad, kDecodePad);
        load_row(rows[j], w.head_dim, to);
      }
    });
  }

  // out[r] += gate[r] * softmax(scale * query[r] . prompt_key) . prompt_value
  template <int N>
  void add_prompts(const float* query, const float* gate, float* out) const {
    RowAddress key[kMaxPromptLength], value[kMaxPromptLength];
    const int64_t count = round_up(w.prompt_length, kLanes);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t row = min(j, w.prompt_length - 1);
      key[j] = reinterpret_cast<RowAddress>(s.prompt_key + row * q.padded);
      value[j] = reinterpret_cast<RowAddress>(s.prompt_value + row * q.padded);
    }
    score_keys<float, true, N>(key, count, q.padded, query, q.padded, w.scale * kLog2E, s.scores, nullptr);
    cap_tile<N>(s.scores, count);
    for (int64_t i = w.prompt_length * N; i < count * N; ++i) s.scores[i] = -kInfinity;
    RunningSoftmax state;
    state.reset();
    absorb<N>(s.scores, count, state, nullptr, 0, 0);
    float factor[kLanes];
    for (int i = 0; i < kLanes; ++i) factor[i] = gate[i % N] / sum_of_row<N>(state, i % N);
    for (int64_t i = 0; i < count * N; i += kLanes) store(s.scores + i, load(factor) * load(s.scores + i));
    add_values<float, N>(value, w.prompt_length, q.padded, s.scores, out, q.padded, nullptr);
  }

  // Divides acc by l, adds the prompt branch, writes out and lse.
  void write_results() {
    const Prompt prompt(w, q.b);
    for (int64_t head = 0; head < q.heads; ++head) {
      if (prompt.given()) {
        load_prompts(w.prompt_key, prompt.row, q.first_head + head, s.prompt_key);
        load_prompts(w.prompt_value, prompt.row, q.first_head + head, s.prompt_value);
      }
      for_each_tile(q.rows, [&]<int N>(TileOf<N>, int64_t row, int64_t tile) {
        const RunningSoftmax& state = s.states[head * tiles_of(q.rows) + tile];
        float* out = acc_of(head, row);
        const float* query = query_of(head, row);
        float gate[N];
        bool all_open = true;
        for (int r = 0; r < N; ++r) {
          const int64_t h = q.head_of(head, row + r);
          const float l = sum_of_row<N>(state, r);
          float inverse = l > 0 ? 1 / l : l;
          float lse = l == 0 ? -kInfinity : (state.m[r] + __builtin_log2f(l)) * static_cast<float>(kLn2);
          if (w.sinks.given) {  // here and nowhere else, however many splits there are
            const RowEnd end = end_row(static_cast<double>(state.m[r]) * kLn2, l, w.sinks.data[h]);
            inverse = end.factor, lse = static_cast<float>(end.lse);
          }
          for (int64_t d = r * q.padded; d < (r + 1) * q.padded; d += kLanes) {
            store(out + d, broadcast(inverse) * load(out + d));
          }
          w.lse[(q.b * w.num_heads_q + h) * w.seqlen_q + q.token_of(row + r)] = lse;
          gate[r] = prompt.gate(w, h);
          all_open = all_open && gate[r] != 0;
        }
        // A closed gate leaves its row untouched, to the bit: 0 * prompts could turn -0 into 0, or be NaN.
        if (all_open) {
          add_prompts<N>(query, gate, out);
        } else {
          for (int r = 0; r < N; ++r) {
            if (gate[r] != 0) add_prompts<1>(query + r * q.padded, gate + r, out + r * q.padded);
          }
        }
        for (int r = 0; r < N; ++r) {
          store_columns(
              out + r * q.padded, broadcast(1.f), w.head_dim,
              static_cast<T*>(row_pointer(w.out, q.b, q.head_of(head, row + r), q.token_of(row + r))));
        }
      });
    }
  }

  const DecodeWork& w;
  const DecodeScratch s;
  const QueryBlock q;
  const int64_t query_stride;
};

// A block of queries against some keys of one split.
template <class T>
inline void attend(const DecodeWork& w, const QueryBlock& q, int64_t split, Range keys, void* memory) {
  DecodeItem<T, false> item(w, q, memory);
  item.attend(keys);
  if (item.may_leak()) {  // one token at a time meets no key that it does not see
    for (int64_t i = 0; i < q.tokens; ++i) {
      const QueryBlock one = q.one_token(i);
      const Range seen = one.visible(w, one.token);
      const int64_t begin = max(keys.begin, seen.begin);
      attend<T>(w, one, split, {begin, max(begin, min(keys.end, seen.end))}, memory);
    }
  } else if (item.may_flush(keys)) {
    DecodeItem<T, true> again(w, q, memory);
    again.attend(keys);
    again.complete(split);
  } else {
    item.complete(split);
  }
}

// An item is a query block against one split of its keys.
int64_t attend_items(const DecodeWork& w) {
  return w.num_sequences * w.query_blocks * w.head_blocks * w.splits;
}

int64_t decode_scratch(const DecodeWork& w) { return DecodeScratch(w, nullptr).bytes; }

void attend_run(const DecodeWork& w, int64_t begin, int64_t end, void* memory) {
  with_dtype(w.query.dtype, [&]<class T>() {
    for (int64_t item = begin; item < end; ++item) {
      const QueryBlock q(w, item / w.splits, w.heads_per_item);
      attend<T>(w, q, item % w.splits, q.keys_of_split(w, item % w.splits), memory);
    }
  });
}

// An item is a query block of one key head, however many are walked together. With 8 heads to an item two
// splits would leave one thread to combine and to add all prompts (prompts on / off 1.08 to 1.19).
int64_t combine_items(const DecodeWork& w) {
  return w.splits == 1 ? 0 : w.num_sequences * w.query_blocks * w.num_heads_kv;
}

void combine_run(const DecodeWork& w, int64_t begin, int64_t end, void* memory) {
  with_dtype(w.query.dtype, [&]<class T>() {
    for (int64_t item = begin; item < end; ++item) {
      DecodeItem<T, false>(w, QueryBlock(w, item, 1), memory).combine();
    }
  });
}

}  // namespace
}  // namespace zinit::cpu
