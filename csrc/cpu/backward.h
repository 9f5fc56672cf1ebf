// The gradients, one unit of work (see BackwardWork) at a time. With P = exp(S - lse), Pp = softmax(Sp) of
// the prompts, s = act(gate):
//   dPp = dO pv^T    r = rowsum(Pp dPp)    delta = rowsum(dO out) - s r - dlse
//   dS = P (dO v^T - delta)    dSp = s Pp (dPp - r)
//   dq = scale (dS k + dSp pk)    dk = scale dS^T q    dv = P^T dO
//   dpk = scale dSp^T q    dpv = s Pp^T dO    dgate = act'(gate) sum r
//   dsink = -sum exp(sink - lse) delta
// With a soft cap, dS and dSp are multiplied by its slope at their scores.
// delta belongs to the token branch alone: out holds the prompt branch too, and s r takes it off again. With a
// sink in lse, P, dS and all that follows from them stay as they are.
#pragma once
#include "backward_columns.h"
#include "kernels.h"
#include "special.h"

namespace zinit::cpu {
namespace {

// kCareful: as special.h says, for inputs that are not all finite.
template <class Tile, bool kCareful>
class BackwardUnit {
  using Unit = typename Tile::Unit;

 public:
  BackwardUnit(const BackwardWork& work, int64_t b, int64_t kv_head, void* memory)
      : w(work),
        s(work, memory),
        sequence(work, b),
        visible(work, sequence),
        prompt(work, b),
        how(work),
        b(b),
        kv_head(kv_head),
        width(round_up(work.head_dim, kLanes)),
        steps(ceil_div(work.head_dim, Tile::kPack)),
        strip_units(s.strip_units),
        group_size(work.num_heads_q / work.num_heads_kv),
        blocks(ceil_div(sequence.queries, work.block_queries)) {}

  // One split: its sums, and the gradients of its queries.
  void run(int64_t split) {
    if (prompt.given()) {
      pack_prompt_rows<Tile>(w, w.prompt_key, prompt.row, kv_head, s.prompt_key);
      pack_prompt_rows<Tile>(w, w.prompt_value, prompt.row, kv_head, s.prompt_value);
      if constexpr (Tile::kPack > 1) {
        pack_prompt_lanes<Tile>(w, w.prompt_key, prompt.row, kv_head, s.prompt_key_lanes);
      }
    }
    prepare_sums(split);
    keys_met = {sequence.keys, 0};
    bool prompts_added = false;
    for (int64_t pass = first_pass(split); pass < first_pass(split + 1); ++pass) {
      head = kv_head * group_size + pass / blocks;
      first = pass % blocks * w.block_queries;
      queries = min(w.block_queries, sequence.queries - first);
      pack_queries();
      if (prompt.given()) prompts_added |= prompt_gradients(pass % blocks);
      if (w.grad_sinks.given) sink_gradients(pass % blocks);
      if (w.wants_tokens()) token_gradients();
      if (w.grad_query.given) {
        store_rows<kRows>(s.grad_query, width, queries, w.scale,
                          sequence.query_row(w.grad_query, head, first), w.grad_query);
      }
    }
    if (key_sum != nullptr && keys_met.begin < keys_met.end) {
      note(key_sum + keys_met.begin * w.padded_dim, keys_met.end - keys_met.begin);
      note(value_sum + keys_met.begin * w.padded_dim, keys_met.end - keys_met.begin);
    }
    if (w.wants_prompt() && prompts_added) {
      note(prompt_key_sum, w.prompt_length);
      note(prompt_value_sum, w.prompt_length);
    }
  }

  // A later split of a unit onto the first, as the second stage adds their partials.
  void add_to_first_sum() {
    if (key_sum == nullptr) return;
    const int64_t key_floats = w.seqlen_k * w.padded_dim, used = sequence.keys * w.padded_dim;
    for (int64_t part = 0; part < 2; ++part) {
      float* sum = s.key_sum + part * key_floats;
      const float* more = sum + 2 * key_floats;
      for (int64_t i = 0; i < used; i += kLanes) store(sum + i, load(sum + i) + load(more + i));
    }
  }

  // After the last split of a unit that takes them all: the gradients of its keys.
  void finish_keys() {
    if (group_size * blocks == 0) {
      clear_keys(0, sequence.keys);
    } else if (key_sum != nullptr) {
      store_keys<false>(0, sequence.keys, s.key_sum, s.key_sum + w.seqlen_k * w.padded_dim);
    }
  }

  void forget() { seen = {}; }

  // Whether all gradients are finite: nothing hidden can have reached them.
  bool is_finite() const { return seen.is_finite(); }

  // Whether inputs that vdpbf16ps counts as 0 can have changed a gradient.
  bool may_flush(int64_t split) const {
    if (!seen.has_tiny()) return false;
    bool found = false;
    const auto look = [&](const View& view, void* row, int64_t count) {
      if (found) return;
      visit_rows(row, view.token, view.dtype, [&](auto rows) { found = has_tiny(rows, count, w.head_dim); });
    };
    for (int64_t pass = first_pass(split); pass < first_pass(split + 1); ++pass) {
      const int64_t h = kv_head * group_size + pass / blocks, i = pass % blocks * w.block_queries;
      const int64_t count = min(w.block_queries, sequence.queries - i);
      look(w.query, sequence.query_row(w.query, h, i), count);
      look(w.grad_out, sequence.query_row(w.grad_out, h, i), count);
    }
    const int64_t keys = keys_met.end - keys_met.begin;
    look(w.key, sequence.key_row(w.key, kv_head, keys_met.begin), keys);
    look(w.value, sequence.key_row(w.value, kv_head, keys_met.begin), keys);
    if (!prompt.given()) return found;
    look(w.prompt_key, row_pointer(w.prompt_key, prompt.row, kv_head, 0), w.prompt_length);
    look(w.prompt_value, row_pointer(w.prompt_value, prompt.row, kv_head, 0), w.prompt_length);
    return found;
  }

 private:
  bool wants_scores() const { return w.grad_query.given || w.grad_key.given; }
  int64_t strip_queries(int64_t row) const { return min(kStrip, queries - row); }

  int64_t first_pass(int64_t split) const { return group_size * blocks * split / w.splits; }

  // Where the gradients of keys and prompts are summed over the passes of a split. Keys that see one pass
  // alone need no sum: each block of them is written when it is done.
  void prepare_sums(int64_t split) {
    const int64_t key_floats = w.seqlen_k * w.padded_dim, used = sequence.keys * w.padded_dim;
    const int64_t index = (b * w.num_heads_kv + kv_head) * w.splits + split;
    if (w.stores_partials()) {
      key_sum = w.key_partials + index * 2 * key_floats;
    } else if (w.wants_keys() && group_size * blocks > 1) {
      key_sum = s.key_sum + (split > 0 ? 2 * key_floats : 0);
    }
    if (key_sum != nullptr) {
      value_sum = key_sum + key_floats;
      clear(key_sum, used);
      clear(value_sum, used);
    }
    if (w.wants_prompt()) {
      const int64_t floats = w.prompt_length * w.padded_dim;
      prompt_key_sum = w.prompt_partials + index * 2 * floats;
      prompt_value_sum = prompt_key_sum + floats;
      clear(prompt_key_sum, 2 * floats);
    }
  }

  void pack_queries() {
    const auto pack = [&](const View& view, Unit* transposed, Unit* lanes, bool want_lanes) {
      visit_rows(sequence.query_row(view, head, first), view.token, view.dtype, [&](auto rows) {
        for (int64_t row = 0; row < queries; row += kStrip) {
          Tile::pack_transposed(rows.from(row), strip_queries(row), w.head_dim,
                                transposed + row / kStrip * strip_units);
        }
        if (want_lanes) Tile::pack_lanes(rows, queries, w.head_dim, nullptr, lanes);
      });
    };
    pack(w.query, s.query, s.query_lanes, w.grad_key.given || w.grad_prompt_key.given);
    pack(w.grad_out, s.grad_out, s.grad_out_lanes, w.grad_value.given || w.grad_prompt_value.given);
    clear(s.grad_query, queries * width);
    if ((w.wants_tokens() || w.grad_sinks.given) &&
        row_statistics<Tile>(w, sequence, how, head, first, queries, s)) {
      for (int64_t row = 0; row < queries; row += kStrip) redo_coarse_statistics(row);
    }
  }

  // One more pass over the keys, for rows whose scores are so large that lse does not say how they differ: m
  // and l, from which forward made it.
  void redo_coarse_statistics(int64_t row) {
    const int64_t rows = strip_queries(row), start = first + row, end = visible.upper(start + rows - 1);
    SoftmaxState state;
    state.reset();
    for (int64_t block = visible.lower(start); block < end; block += kBackwardKeys) {
      const int64_t count = min(kBackwardKeys, end - block);
      const float* bias = sequence.bias_from(block);
      visit_rows(sequence.key_row(w.key, kv_head, block), w.key.token, w.key.dtype,
                 [&](auto from) { Tile::pack_rows(from, count, w.head_dim, bias, s.key); });
      Extent extents[2];
      strip_extents<Tile>(visible, start, rows, block, count, extents);
      score_tile<Tile>(s.key, width / Tile::kPack, s.query + row / kStrip * strip_units, steps, extents,
                       s.scores, kGroup);
      for (int v = 0; v < 2; ++v) {
        const int64_t lane = v * kLanes;
        mask_column(visible, start + lane, extents[v], block, how, bias, s.scores + lane, kGroup);
        softmax_column<Tile>(extents[v], how, s.scores, kGroup, lane, state, {s.ds_by_key, kGroup}, kCareful);
      }
    }
    const float* lse = w.lse + sequence.lse_index(w.num_heads_q, head, start);
    for (int64_t i = 0; i < rows; ++i) {
      if (lse[i] == -kInfinity || __builtin_fabsf(lse[i]) <= kCoarse) continue;
      const double scale = static_cast<double>(how.remaining), m = static_cast<double>(state.m[i]) * scale;
      const float l = state.l[i];
      float& pivot = s.pivot[row + i];
      if (w.sinks.given && (l == 0.f || static_cast<double>(w.sinks.data[head]) > m)) {
        const double sum = end_row(m, l, w.sinks.data[head]).lse;
        pivot = pivot_of(sum, scale);
        s.rest[row + i] = static_cast<float>((sum - static_cast<double>(pivot) * scale) / kLn2);
      } else {  // not by m + log(l): where m is 1e30, that is m in double too
        const double sink = w.sinks.given ? __builtin_exp(static_cast<double>(w.sinks.data[head]) - m) : 0.;
        pivot = state.m[i];
        s.rest[row + i] = __builtin_log2f(l + static_cast<float>(sink));
      }
    }
  }

  // Whether it added to the gradients of the prompts.
  bool prompt_gradients(int64_t block) {
    const float gate = prompt.gate(w, head);
    const int64_t P = w.prompt_length;
    Vec gate_sum = broadcast(0.f);
    for (int64_t row = 0; row < queries; row += kGroup) {
      const int64_t rows = min(kGroup, queries - row), columns = round_up(rows, kStrip);
      for (int64_t c = 0; c < columns; c += kStrip) {
        const int64_t strip = (row + c) / kStrip * strip_units, units = width / Tile::kPack;
        product_rows<Tile, 2>({s.prompt_key, units, 1, s.query + strip, kStrip},
                              Overwrite{s.scores + c, kGroup}, 0, P, 0, steps);
        product_rows<Tile, 2>({s.prompt_value, units, 1, s.grad_out + strip, kStrip},
                              Overwrite{s.dp + c, kGroup}, 0, P, 0, steps);
      }
      for (int64_t c = 0; c < columns; c += kLanes) {
        gate_sum = gate_sum + prompt_gradient_column<Tile>(w, gate, c, s.delta + row, s);
      }
      if (gate == 0.f) continue;
      Range over_queries[kMaxPromptLength / kRows];
      for (Range& range : over_queries) range = {0, ceil_div(rows, Tile::kPack)};
      if (w.grad_prompt_value.given) {
        product_ranges(p_by_query(row), Add{prompt_value_sum, w.padded_dim}, P, width, over_queries);
      }
      if (w.grad_prompt_key.given) {
        product_ranges(ds_by_query(row), Add{prompt_key_sum, w.padded_dim}, P, width, over_queries);
      }
      if (!w.grad_query.given) continue;
      Range over_keys[kGroup / kRows];
      for (Range& range : over_keys) range = {0, ceil_div(P, Tile::kPack)};
      product_ranges<Tile>({s.ds_by_key, 1, kGroup, s.prompt_key_lanes, width},
                           Add{s.grad_query + row * width, width}, rows, width, over_keys);
    }
    w.gate_partials[(b * w.num_heads_q + head) * w.blocks + block] = reduce_add(gate_sum);
    return gate != 0.f;
  }

  void sink_gradients(int64_t block) {
    const float* lse = w.lse + sequence.lse_index(w.num_heads_q, head, first);
    w.sink_partials[(b * w.num_heads_q + head) * w.blocks + block] =
        sink_gradient<Tile>(how, w.sinks.data[head], lse, queries, s);
  }

  void token_gradients() {
    const int64_t begin = visible.lower(first), end = max(begin, visible.upper(first + queries - 1));
    keys_met = {min(keys_met.begin, begin), max(keys_met.end, end)};
    for (int64_t block = begin; block < end; block += kBackwardKeys) {
      const int64_t count = min(kBackwardKeys, end - block);
      float *grad_key = s.grad_key, *grad_value = s.grad_value;
      if (key_sum != nullptr) {
        grad_key = key_sum + block * w.padded_dim, grad_value = value_sum + block * w.padded_dim;
      } else if (w.wants_keys()) {
        clear(grad_key, count * w.padded_dim);
        clear(grad_value, count * w.padded_dim);
      }
      key_block(block, count, grad_key, grad_value);
      if (key_sum == nullptr) store_keys<true>(block, block + count, grad_key, grad_value);
    }
    if (key_sum == nullptr && w.wants_keys()) {
      clear_keys(0, min(begin, sequence.keys));
      clear_keys(end, sequence.keys);
    }
  }

  void key_block(int64_t block, int64_t count, float* grad_key, float* grad_value) {
    const float* bias = sequence.bias_from(block);
    visit_rows(sequence.key_row(w.key, kv_head, block), w.key.token, w.key.dtype,
               [&](auto rows) { Tile::pack_rows(rows, count, w.head_dim, bias, s.key); });
    if (Tile::kPack > 1 && w.grad_query.given) pack_key_lanes(block, count, bias);
    visit_rows(sequence.key_row(w.value, kv_head, block), w.value.token, w.value.dtype,
               [&](auto rows) { Tile::pack_rows(rows, count, w.head_dim, bias, s.value); });
    for (int64_t row = 0; row < queries; row += kGroup) {
      const int64_t rows = min(kGroup, queries - row);
      if (visible.upper(first + row + rows - 1) <= block || visible.lower(first + row) >= block + count) {
        continue;
      }
      for (int64_t c = 0; c < round_up(rows, kStrip); c += kStrip)
        strip_gradients(row, c, block, count, bias);
      add_key_gradients(row, rows, block, count, grad_key, grad_value);
    }
  }

  void pack_key_lanes(int64_t block, int64_t count, const float* bias) {
    visit_rows(sequence.key_row(w.key, kv_head, block), w.key.token, w.key.dtype,
               [&](auto rows) { Tile::pack_lanes(rows, count, w.head_dim, bias, s.key_lanes); });
  }

  // p and ds of the strip at columns c of the tile, and what they give its queries.
  void strip_gradients(int64_t row, int64_t c, int64_t block, int64_t count, const float* bias) {
    const int64_t rows = strip_queries(row + c), first_row = first + row + c;
    const int64_t strip = (row + c) / kStrip * strip_units, units = width / Tile::kPack;
    Extent extents[2];
    strip_extents<Tile>(visible, first_row, rows, block, count, extents);
    score_tile<Tile>(s.key, units, s.query + strip, steps, extents, s.scores + c, kGroup);
    if (wants_scores()) {
      score_tile<Tile>(s.value, units, s.grad_out + strip, steps, extents, s.dp + c, kGroup);
    }
    for (int v = 0; v < 2; ++v) {
      const int64_t column = c + v * kLanes;
      if (kCareful) clamp_scores(extents[v], column);
      mask_column(visible, first_row + v * kLanes, extents[v], block, how, bias, s.scores + column, kGroup,
                  s.slopes + column);
      token_gradient_column<Tile>(extents[v], round_up(count, Tile::kPack), how, row, column, wants_scores(),
                                  kCareful, s);
    }
    if (!w.grad_query.given) return;
    Range over_keys[kStrip / kRows];
    query_group_ranges<Tile>(visible, first_row, rows, block, count, over_keys);
    const Product<Tile> product{s.ds_by_key + c, 1, kGroup, s.key_lanes, width};
    const Add into{s.grad_query + (row + c) * width, width};
    if (!kCareful || visible.is_uniform(first_row, first_row + rows - 1)) {
      return product_ranges(product, into, rows, width, over_keys);
    }
    for (int64_t i = 0; i < rows; ++i) {
      Hiding hiding(visible.lower(first_row + i) - block, visible.upper(first_row + i) - block);
      hiding.add(bias, count);
      pack_key_lanes(block, count, hiding.bias);
      product_of_row(product, into, i, width, over_keys);
    }
    pack_key_lanes(block, count, bias);
  }

  // -inf is left to the keys that are hidden.
  void clamp_scores(const Extent& e, int64_t column) const {
    for (int64_t j = e.begin; j < e.end; ++j) {
      float* scores = s.scores + j * kGroup + column;
      store(scores, max(broadcast(-kMaxFloat), load(scores)));
    }
  }

  // The weights and score gradients of the group of queries at `row`, for products along the queries.
  Product<Tile> p_by_query(int64_t row) const {
    return {s.p, kGroup / Tile::kPack, 1, s.grad_out_lanes + row / Tile::kPack * width, width};
  }
  Product<Tile> ds_by_query(int64_t row) const {
    return {s.ds_by_query, kGroup / Tile::kPack, 1, s.query_lanes + row / Tile::kPack * width, width};
  }

  // dK += dS^T q and dV += P^T dO over the group of queries at `row`.
  void add_key_gradients(int64_t row, int64_t rows, int64_t block, int64_t count, float* grad_key,
                         float* grad_value) {
    const int64_t start = first + row;
    const float* bias = sequence.bias_from(block);
    const auto begin_of = [&](int64_t j) {
      return min(max(visible.first_query(block + j) - start, 0), rows);
    };
    const auto end_of = [&](int64_t j) {
      return min(max(visible.end_query(block + j, sequence.queries) - start, 0), rows);
    };
    Range over_queries[kBackwardKeys / kRows];
    for (int64_t j = 0, g = 0; j < count; j += kRows, ++g) {
      const int64_t from = begin_of(j), to = end_of(min(j + kRows, count) - 1);
      over_queries[g] = from < to ? Range{from / Tile::kPack, ceil_div(to, Tile::kPack)} : Range{0, 0};
    }
    const auto add = [&](const Product<Tile>& product, const View& view, Unit* lanes, float* grad) {
      const Add into{grad, w.padded_dim};
      if (!kCareful || (bias == nullptr && visible.is_uniform(start, start + rows - 1))) {
        return product_ranges(product, into, count, width, over_queries);
      }
      const auto pack = [&](const float* bias) {
        visit_rows(sequence.query_row(view, head, start), view.token, view.dtype, [&](auto from) {
          Tile::pack_lanes(from, rows, w.head_dim, bias, lanes + row / Tile::kPack * width);
        });
      };
      for (int64_t j = 0; j < count; ++j) {
        if (hidden(bias, j)) continue;
        pack(Hiding(begin_of(j), end_of(j)).bias);
        product_of_row(product, into, j, width, over_queries);
      }
      pack(nullptr);
    };
    if (w.grad_value.given) add(p_by_query(row), w.grad_out, s.grad_out_lanes, grad_value);
    if (w.grad_key.given) add(ds_by_query(row), w.query, s.query_lanes, grad_key);
  }

  // Rows of floats into a tensor. kNoted: they are results that may have to be repeated; every row is noted,
  // or each first of kRows.
  template <int kNoted>
  void store_rows(const float* from, int64_t from_row, int64_t rows, float scale, void* to,
                  const View& view) {
    Extremes<Tile::kFlushes> noted;
    visit_rows(to, view.token, view.dtype, [&](auto target) {
      const Vec factor = broadcast(scale);
      for (int64_t i = 0; i < rows; ++i) {
        const float* row = from + i * from_row;
        const bool leads = kNoted == 1 || i % kRows == 0;
        int64_t d = 0;
        for (; d + kLanes <= w.head_dim; d += kLanes) {
          const Vec x = load(row + d) * factor;
          if (kNoted > 0) noted.note(x, leads);
          store(target[i] + d, x);
        }
        if (d == w.head_dim) continue;
        const Vec x = load(row + d) * factor;
        if (kNoted > 0) noted.note_first(x, w.head_dim - d, leads);
        store_first(target[i] + d, w.head_dim - d, x);
      }
    });
    if (kNoted > 0) seen.note(noted);
  }

  // Rows of a sum that the second stage will store. Two at a time: one chain of notes would wait for itself.
  void note(const float* sum, int64_t rows) {
    Extremes<Tile::kFlushes> noted[2];
    const auto note_row = [&](const float* row, Extremes<Tile::kFlushes>& into, int64_t d) {
      if (d + kLanes <= w.head_dim) {
        into.note(load(row + d));
      } else {
        into.note_first(load(row + d), w.head_dim - d);
      }
    };
    int64_t j = 0;
    for (; j + 2 <= rows; j += 2, sum += 2 * w.padded_dim) {
      for (int64_t d = 0; d < w.head_dim; d += kLanes) {
        note_row(sum, noted[0], d);
        note_row(sum + w.padded_dim, noted[1], d);
      }
    }
    for (int64_t d = 0; j < rows && d < w.head_dim; d += kLanes) note_row(sum, noted[0], d);
    seen.note(noted[0]);
    seen.note(noted[1]);
  }

  template <bool kNotes>
  void store_keys(int64_t begin, int64_t end, const float* grad_key, const float* grad_value) {
    if (w.grad_key.given) {
      store_rows<kNotes ? 1 : 0>(grad_key, w.padded_dim, end - begin, w.scale,
                                 sequence.key_row(w.grad_key, kv_head, begin), w.grad_key);
    }
    if (w.grad_value.given) {
      store_rows<kNotes ? 1 : 0>(grad_value, w.padded_dim, end - begin, 1.f,
                                 sequence.key_row(w.grad_value, kv_head, begin), w.grad_value);
    }
  }

  void clear_keys(int64_t begin, int64_t end) {
    clear(s.grad_key, w.padded_dim);
    for (int64_t j = begin; j < end; ++j) store_keys<false>(j, j + 1, s.grad_key, s.grad_key);
  }

  const BackwardWork& w;
  const BackwardScratch<Tile> s;
  const Sequence sequence;
  const Visibility visible;
  const Prompt prompt;
  const ScoreScale how;
  const int64_t b, kv_head, width, steps, strip_units, group_size, blocks;
  int64_t head = 0, first = 0, queries = 0;                      // of the current pass
  Range keys_met = {0, 0};                                       // by the queries of the current split
  float *key_sum = nullptr, *value_sum = nullptr;                // [S, padded_dim]; nullptr: not needed
  float *prompt_key_sum = nullptr, *prompt_value_sum = nullptr;  // [P, padded_dim]
  Extremes<Tile::kFlushes> seen;
};

}  // namespace
}  // namespace zinit::cpu
