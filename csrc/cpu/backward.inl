// The gradients, one unit of work (see BackwardPlan) at a time. With A = exp(S - lse), Ap = softmax(Sp), s =
// act(gate):
//   dAp = dO pv^T    r = rowsum(Ap dAp)    delta = rowsum(dO out) - s r - dlse
//   dS = A (dO v^T - delta)    dSp = s Ap (dAp - r)
//   dq = scale (dS k + dSp pk)    dk = scale dS^T q    dv = A^T dO
//   dpk = scale dSp^T q    dpv = s Ap^T dO    dgate = act'(gate) sum r
// delta belongs to the token branch alone: out holds the prompt branch too, and s r takes it off again.
#pragma once
#include "backward_columns.inl"
#include "kernels.h"

namespace zinit::cpu {
namespace {

template <class Tile>
class BackwardUnit {
  using Unit = typename Tile::Unit;

 public:
  BackwardUnit(const BackwardPlan& plan, int64_t b, int64_t head_kv, void* memory)
      : p(plan),
        s(plan, memory),
        sequence(plan, b),
        visible(plan, sequence),
        prompt(plan, b),
        how(plan),
        b(b),
        head_kv(head_kv),
        width(round_up(plan.head_dim, kLanes)),
        steps(ceil_div(plan.head_dim, Tile::kPack)),
        strip_units(s.strip_units),
        group_size(plan.num_heads_q / plan.num_heads_kv),
        blocks(ceil_div(sequence.queries, plan.block_queries)) {}

  void run(Range splits) {
    if (prompt.given()) {
      pack_prompt_rows<Tile>(p, p.prompt_key, prompt.row, head_kv, s.prompt_key);
      pack_prompt_rows<Tile>(p, p.prompt_value, prompt.row, head_kv, s.prompt_value);
      if constexpr (Tile::kPack > 1) {
        pack_prompt_lanes<Tile>(p, p.prompt_key, prompt.row, head_kv, s.prompt_key_lanes);
      }
    }
    for (int64_t split = splits.begin; split < splits.end; ++split) {
      run_split(split);
      if (split > splits.begin && key_sum != nullptr) add_to_first_sum();
    }
    if (p.key_partials != nullptr) return;
    if (key_sum != nullptr)
      store_keys(0, sequence.keys, s.key_sum, s.key_sum + p.seqlen_k * p.padded_dim);
    else if (group_size * blocks == 0)
      clear_keys(0, sequence.keys);
  }

 private:
  bool wants_scores() const { return p.grad_query.data != nullptr || p.grad_key.data != nullptr; }
  int64_t strip_queries(int64_t row) const { return min(kStrip, queries - row); }

  void run_split(int64_t split) {
    prepare_sums(split);
    const int64_t passes = group_size * blocks, end = passes * (split + 1) / p.splits;
    for (int64_t pass = passes * split / p.splits; pass < end; ++pass) {
      head = head_kv * group_size + pass / blocks;
      first = pass % blocks * p.block_queries;
      queries = min(p.block_queries, sequence.queries - first);
      pack_queries();
      if (prompt.given()) prompt_gradients(pass % blocks);
      if (p.wants_tokens()) token_gradients();
      if (p.grad_query.data) {
        store_gradient(s.grad_query, width, queries, p.scale, sequence.query_row(p.grad_query, head, first),
                       p.grad_query);
      }
    }
  }

  // Where the gradients of keys and prompts are summed over the passes of a split. Keys that see one pass
  // alone need no sum: each block of them is written when it is done.
  void prepare_sums(int64_t split) {
    const int64_t key_floats = p.seqlen_k * p.padded_dim, used = sequence.keys * p.padded_dim;
    const int64_t index = (b * p.num_heads_kv + head_kv) * p.splits + split;
    if (p.wants_keys() && p.key_partials != nullptr)
      key_sum = p.key_partials + index * 2 * key_floats;
    else if (p.wants_keys() && group_size * blocks > 1)
      key_sum = s.key_sum + (split > 0 ? 2 * key_floats : 0);
    if (key_sum != nullptr) {
      value_sum = key_sum + key_floats;
      __builtin_memset(key_sum, 0, static_cast<size_t>(used) * sizeof(float));
      __builtin_memset(value_sum, 0, static_cast<size_t>(used) * sizeof(float));
    }
    if (p.wants_prompt()) {
      const int64_t floats = p.prompt_length * p.padded_dim;
      prompt_key_sum = p.prompt_partials + index * 2 * floats;
      prompt_value_sum = prompt_key_sum + floats;
      __builtin_memset(prompt_key_sum, 0, static_cast<size_t>(2 * floats) * sizeof(float));
    }
  }

  // A later split of a unit onto the first, as the second stage adds their partials.
  void add_to_first_sum() {
    const int64_t key_floats = p.seqlen_k * p.padded_dim, used = sequence.keys * p.padded_dim;
    for (int64_t part = 0; part < 2; ++part) {
      float* sum = s.key_sum + part * key_floats;
      const float* more = sum + 2 * key_floats;
      for (int64_t i = 0; i < used; i += kLanes) store(sum + i, load(sum + i) + load(more + i));
    }
  }

  void pack_queries() {
    const auto pack = [&](const View& view, Unit* transposed, Unit* lanes, bool want_lanes) {
      visit_rows(sequence.query_row(view, head, first), view.token, view.dtype, [&](auto rows) {
        for (int64_t row = 0; row < queries; row += kStrip) {
          Tile::pack_transposed(rows.from(row), strip_queries(row), p.head_dim,
                                transposed + row / kStrip * strip_units);
        }
        if (want_lanes) Tile::pack_lanes(rows, queries, p.head_dim, nullptr, lanes);
      });
    };
    pack(p.query, s.query, s.query_lanes, p.grad_key.data != nullptr || p.grad_prompt_key.data != nullptr);
    pack(p.grad_out, s.grad_out, s.grad_out_lanes,
         p.grad_value.data != nullptr || p.grad_prompt_value.data != nullptr);
    __builtin_memset(s.grad_query, 0, static_cast<size_t>(queries * width) * sizeof(float));
    if (p.wants_tokens() && row_statistics<Tile>(p, sequence, how, head, first, queries, s)) {
      for (int64_t row = 0; row < queries; row += kStrip) redo_coarse_statistics(row);
    }
  }

  // One more pass over the keys, for rows whose scores are so large that lse does not say how they differ:
  // the maximum and the sum from which forward made it.
  void redo_coarse_statistics(int64_t row) {
    const int64_t rows = strip_queries(row), start = first + row, end = visible.upper(start + rows - 1);
    SoftmaxState state;
    state.reset();
    for (int64_t block = visible.lower(start); block < end; block += kBackwardKeys) {
      const int64_t count = min(kBackwardKeys, end - block);
      const float* bias = sequence.key_bias ? sequence.key_bias + block : nullptr;
      visit_rows(sequence.key_row(p.key, head_kv, block), p.key.token, p.key.dtype,
                 [&](auto from) { Tile::pack_rows(from, count, p.head_dim, bias, s.key); });
      Extent extents[2];
      strip_extents<Tile>(visible, start, rows, block, count, extents);
      score_tile<Tile>(s.key, width / Tile::kPack, s.query + row / kStrip * strip_units, steps, extents,
                       s.scores, kGroup);
      for (int v = 0; v < 2; ++v) {
        const int64_t lane = v * kLanes;
        mask_column(visible, start + lane, extents[v], block, how, bias, s.scores + lane, kGroup);
        softmax_column<Tile>(extents[v], how, s.scores, kGroup, lane, state, {s.grad_scores_by_key, kGroup});
      }
    }
    const float* lse = p.lse + sequence.lse_index(p.num_heads_q, head, start);
    for (int64_t i = 0; i < rows; ++i) {
      if (lse[i] == -kInfinity || __builtin_fabsf(lse[i]) <= kCoarse) continue;
      s.pivot[row + i] = state.maximum[i];
      s.rest[row + i] = __builtin_log2f(state.sum[i]);
    }
  }

  void prompt_gradients(int64_t block) {
    const float gate = prompt.gate(p, head);
    const int64_t P = p.prompt_length;
    Vec gate_sum = broadcast(0.f);
    for (int64_t row = 0; row < queries; row += kGroup) {
      const int64_t rows = min(kGroup, queries - row), columns = round_up(rows, kStrip);
      for (int64_t c = 0; c < columns; c += kStrip) {
        const int64_t strip = (row + c) / kStrip * strip_units, units = width / Tile::kPack;
        product_rows<Tile, 2>({s.prompt_key, units, 1, s.query + strip, kStrip},
                              Overwrite{s.scores + c, kGroup}, 0, P, 0, steps);
        product_rows<Tile, 2>({s.prompt_value, units, 1, s.grad_out + strip, kStrip},
                              Overwrite{s.grad_scores + c, kGroup}, 0, P, 0, steps);
      }
      for (int64_t c = 0; c < columns; c += kLanes) {
        gate_sum = gate_sum + prompt_gradient_column<Tile>(P, p.scale, gate, c, s.delta + row, s);
      }
      if (gate == 0.f) continue;
      Range over_queries[kMaxPromptLength / kRows];
      for (Range& range : over_queries) range = {0, ceil_div(rows, Tile::kPack)};
      add_key_gradients(row, P, over_queries, p.grad_prompt_key.data ? prompt_key_sum : nullptr,
                        p.grad_prompt_value.data ? prompt_value_sum : nullptr);
      if (p.grad_query.data == nullptr) continue;
      Range over_keys[kGroup / kRows];
      for (Range& range : over_keys) range = {0, ceil_div(P, Tile::kPack)};
      product_ranges<Tile>({s.grad_scores_by_key, 1, kGroup, s.prompt_key_lanes, width},
                           Add{s.grad_query + row * width, width}, rows, width, over_keys);
    }
    p.gate_partials[(b * p.num_heads_q + head) * p.blocks + block] = reduce_add(gate_sum);
  }

  void token_gradients() {
    const int64_t begin = visible.lower(first), end = max(begin, visible.upper(first + queries - 1));
    for (int64_t block = begin; block < end; block += kBackwardKeys) {
      const int64_t count = min(kBackwardKeys, end - block);
      float *grad_key = s.grad_key, *grad_value = s.grad_value;
      if (key_sum != nullptr) {
        grad_key = key_sum + block * p.padded_dim, grad_value = value_sum + block * p.padded_dim;
      } else if (p.wants_keys()) {
        __builtin_memset(grad_key, 0, static_cast<size_t>(count * p.padded_dim) * sizeof(float));
        __builtin_memset(grad_value, 0, static_cast<size_t>(count * p.padded_dim) * sizeof(float));
      }
      key_block(block, count, grad_key, grad_value);
      if (key_sum == nullptr) store_keys(block, block + count, grad_key, grad_value);
    }
    if (key_sum == nullptr && p.wants_keys()) {
      clear_keys(0, min(begin, sequence.keys));
      clear_keys(end, sequence.keys);
    }
  }

  void key_block(int64_t block, int64_t count, float* grad_key, float* grad_value) {
    const float* bias = sequence.key_bias ? sequence.key_bias + block : nullptr;
    visit_rows(sequence.key_row(p.key, head_kv, block), p.key.token, p.key.dtype, [&](auto rows) {
      Tile::pack_rows(rows, count, p.head_dim, bias, s.key);
      if constexpr (Tile::kPack > 1) {
        if (p.grad_query.data) Tile::pack_lanes(rows, count, p.head_dim, bias, s.key_lanes);
      }
    });
    visit_rows(sequence.key_row(p.value, head_kv, block), p.value.token, p.value.dtype,
               [&](auto rows) { Tile::pack_rows(rows, count, p.head_dim, bias, s.value); });
    for (int64_t row = 0; row < queries; row += kGroup) {
      const int64_t rows = min(kGroup, queries - row);
      if (visible.upper(first + row + rows - 1) <= block || visible.lower(first + row) >= block + count)
        continue;
      for (int64_t c = 0; c < round_up(rows, kStrip); c += kStrip)
        strip_gradients(row, c, block, count, bias);
      Range over_queries[kBackwardKeys / kRows];
      for (int64_t j = 0, g = 0; j < count; j += kRows, ++g) {
        const int64_t last = min(j + kRows, count) - 1, start = first + row;
        const int64_t from = min(max(visible.first_query(block + j) - start, 0), rows);
        const int64_t to = min(max(visible.end_query(block + last, sequence.queries) - start, 0), rows);
        over_queries[g] = from < to ? Range{from / Tile::kPack, ceil_div(to, Tile::kPack)} : Range{0, 0};
      }
      add_key_gradients(row, count, over_queries, p.grad_key.data ? grad_key : nullptr,
                        p.grad_value.data ? grad_value : nullptr);
    }
  }

  // Weights and score gradients of the strip at columns c of the tile, and what they give its queries.
  void strip_gradients(int64_t row, int64_t c, int64_t block, int64_t count, const float* bias) {
    const int64_t rows = strip_queries(row + c), first_row = first + row + c;
    const int64_t strip = (row + c) / kStrip * strip_units, units = width / Tile::kPack;
    Extent extents[2];
    strip_extents<Tile>(visible, first_row, rows, block, count, extents);
    score_tile<Tile>(s.key, units, s.query + strip, steps, extents, s.scores + c, kGroup);
    if (wants_scores()) {
      score_tile<Tile>(s.value, units, s.grad_out + strip, steps, extents, s.grad_scores + c, kGroup);
    }
    for (int v = 0; v < 2; ++v) {
      const int64_t column = c + v * kLanes;
      mask_column(visible, first_row + v * kLanes, extents[v], block, how, bias, s.scores + column, kGroup);
      token_gradient_column<Tile>(extents[v], round_up(count, Tile::kPack), how, row, column, wants_scores(),
                                  s);
    }
    if (p.grad_query.data == nullptr) return;
    Range over_keys[kStrip / kRows];
    query_group_ranges<Tile>(visible, first_row, rows, block, count, over_keys);
    product_ranges<Tile>({s.grad_scores_by_key + c, 1, kGroup, s.key_lanes, width},
                         Add{s.grad_query + (row + c) * width, width}, rows, width, over_keys);
  }

  // dK += dS^T q and dV += A^T dO over the group of queries at `row`.
  void add_key_gradients(int64_t row, int64_t keys, const Range* over_queries, float* grad_key,
                         float* grad_value) {
    const int64_t lanes = row / Tile::kPack * width;
    if (grad_value != nullptr) {
      product_ranges<Tile>({s.weights, kGroup / Tile::kPack, 1, s.grad_out_lanes + lanes, width},
                           Add{grad_value, p.padded_dim}, keys, width, over_queries);
    }
    if (grad_key != nullptr) {
      product_ranges<Tile>({s.grad_scores_by_query, kGroup / Tile::kPack, 1, s.query_lanes + lanes, width},
                           Add{grad_key, p.padded_dim}, keys, width, over_queries);
    }
  }

  void store_gradient(const float* from, int64_t from_row, int64_t rows, float scale, void* to,
                      const View& view) {
    visit_rows(to, view.token, view.dtype, [&](auto target) {
      for (int64_t i = 0; i < rows; ++i)
        store_columns(from + i * from_row, broadcast(scale), p.head_dim, target[i]);
    });
  }

  void store_keys(int64_t begin, int64_t end, const float* grad_key, const float* grad_value) {
    if (p.grad_key.data) {
      store_gradient(grad_key, p.padded_dim, end - begin, p.scale,
                     sequence.key_row(p.grad_key, head_kv, begin), p.grad_key);
    }
    if (p.grad_value.data) {
      store_gradient(grad_value, p.padded_dim, end - begin, 1.f,
                     sequence.key_row(p.grad_value, head_kv, begin), p.grad_value);
    }
  }

  void clear_keys(int64_t begin, int64_t end) {
    __builtin_memset(s.grad_key, 0, static_cast<size_t>(p.padded_dim) * sizeof(float));
    for (int64_t j = begin; j < end; ++j) store_keys(j, j + 1, s.grad_key, s.grad_key);
  }

  const BackwardPlan& p;
  const BackwardScratch<Tile> s;
  const Sequence sequence;
  const Visibility visible;
  const Prompt prompt;
  const ScoreScale how;
  const int64_t b, head_kv, width, steps, strip_units, group_size, blocks;
  int64_t head = 0, first = 0, queries = 0;                      // of the current pass
  float *key_sum = nullptr, *value_sum = nullptr;                // [S, padded_dim]
  float *prompt_key_sum = nullptr, *prompt_value_sum = nullptr;  // [P, padded_dim]
};

int64_t backward_items(const BackwardPlan& p) { return p.num_sequences * p.num_heads_kv * p.units(); }

int64_t backward_scratch(const BackwardPlan& p) {
  int64_t bytes = 0;
  with_tile(p.query, [&](auto tile) { bytes = BackwardScratch<decltype(tile)>(p, nullptr).bytes; });
  return bytes;
}

void backward_run(const BackwardPlan& p, int64_t begin, int64_t end, void* scratch) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t last =
        p.splits - item % p.units();  // a causal mask makes the last one the most work: first
    const Range splits = p.in_turn ? Range{0, p.splits} : Range{last - 1, last};
    const int64_t head_kv = item / p.units() % p.num_heads_kv, b = item / p.units() / p.num_heads_kv;
    with_tile(p.query, [&](auto tile) { BackwardUnit<decltype(tile)>(p, b, head_kv, scratch).run(splits); });
  }
}

}  // namespace
}  // namespace zinit::cpu
