// out = softmax(scale q k^T + mask) v + act(gate) softmax(scale q pk^T) pv, and the token branch's lse.
//
// An item is a block of queries of one head. Key blocks pass through it with an online softmax; then the
// accumulator is divided by the token denominator and the gated prompt block is added to it in the same
// product.
#pragma once
#include "kernels.h"
#include "prompt.inl"

namespace zinit::cpu {
namespace {

// Measured on Zen 4: more queries per item read the keys less often, and 4 strips of 128 columns still fit
// the L2.
constexpr int64_t kForwardQueries = 128;
constexpr int64_t kForwardStrips = kForwardQueries / kStrip;
constexpr int64_t kForwardKeys = 64;

template <class Tile>
struct ForwardScratch {
  using Unit = typename Tile::Unit;
  Unit* query;    // [strips][transposed]
  float* out;     // [kForwardQueries][width]
  Unit* key;      // rows
  Unit* value;    // lanes
  float* scores;  // [keys][kStrip]
  Unit* weights;  // units along the keys
  SoftmaxState* states;
  bool* started;
  int64_t bytes;

  ForwardScratch(const AttentionParams& p, void* memory) {
    const int64_t width = round_up(p.head_dim, kLanes),
                  steps = round_up(width, Tile::kPack * kLanes) / Tile::kPack;
    const int64_t keys = max(kForwardKeys, round_up(p.prompt_length, 2));
    Arena arena{static_cast<char*>(memory)};
    query = arena.take<Unit>(kForwardStrips * steps * kStrip);
    out = arena.take<float>(kForwardQueries * width);
    key = arena.take<Unit>(keys * width / Tile::kPack);
    value = arena.take<Unit>(keys * width / Tile::kPack);
    scores = arena.take<float>(keys * kStrip);
    weights =
        Tile::kPack == 1 ? reinterpret_cast<Unit*>(scores) : arena.take<Unit>(keys / Tile::kPack * kStrip);
    states = arena.take<SoftmaxState>(kForwardStrips);
    started = arena.take<bool>(kForwardStrips);
    bytes = arena.used;
  }
};

template <class Tile>
class ForwardBlock {
  using Unit = typename Tile::Unit;

 public:
  ForwardBlock(const ForwardParams& params, int64_t b, int64_t head, int64_t query_block, void* memory)
      : p(params),
        s(params, memory),
        sequence(params, b),
        visible(params, sequence),
        prompt(params, b),
        how(params),
        head(head),
        head_kv(head / (params.num_heads_q / params.num_heads_kv)),
        first(query_block * kForwardQueries),
        queries(min(kForwardQueries, sequence.queries - first)),
        strips(ceil_div(queries, kStrip)),
        width(round_up(params.head_dim, kLanes)),
        steps(ceil_div(params.head_dim, Tile::kPack)),
        strip_units(round_up(width, Tile::kPack * kLanes) / Tile::kPack * kStrip) {}

  void run() {
    if (queries <= 0) return;
    visit_rows(sequence.query_row(p.query, head, first), p.query.token, p.query.dtype, [&](auto rows) {
      for (int64_t t = 0; t < strips; ++t) {
        Tile::pack_transposed(rows.from(t * kStrip), strip_queries(t), p.head_dim, s.query + t * strip_units);
      }
    });
    for (int64_t t = 0; t < strips; ++t) s.states[t].reset(), s.started[t] = false;
    const int64_t end = visible.upper(first + queries - 1);
    for (int64_t block = visible.lower(first); block < end; block += kForwardKeys) {
      attend(block, min(kForwardKeys, end - block));
    }
    finish();
  }

 private:
  int64_t strip_queries(int64_t t) const { return min(kStrip, queries - t * kStrip); }

  void attend(int64_t block, int64_t count) {
    const float* bias = sequence.key_bias ? sequence.key_bias + block : nullptr;
    visit_rows(sequence.key_row(p.key, head_kv, block), p.key.token, p.key.dtype,
               [&](auto rows) { Tile::pack_rows(rows, count, p.head_dim, bias, s.key); });
    visit_rows(sequence.key_row(p.value, head_kv, block), p.value.token, p.value.dtype,
               [&](auto rows) { Tile::pack_lanes(rows, count, p.head_dim, bias, s.value); });
    for (int64_t t = 0; t < strips; ++t) attend_strip(t, block, count, bias);
  }

  void attend_strip(int64_t t, int64_t block, int64_t count, const float* bias) {
    const int64_t rows = strip_queries(t), first_row = first + t * kStrip;
    Extent extents[2];
    strip_extents<Tile>(visible, first_row, rows, block, count, extents);
    if (extents[0].empty() && extents[1].empty()) return;
    SoftmaxState& state = s.states[t];
    score_tile<Tile>(s.key, width / Tile::kPack, s.query + t * strip_units, steps, extents, s.scores, kStrip);
    for (int v = 0; v < 2; ++v) {
      const int64_t lane = v * kLanes;
      mask_column(visible, first_row + lane, extents[v], block, how, bias, s.scores + lane, kStrip);
      softmax_column<Tile>(extents[v], how, s.scores, kStrip, lane, state, {s.weights, kStrip});
    }
    Range ranges[kStrip / kRows + 1];
    query_group_ranges<Tile>(visible, first_row, rows, block, count, ranges);
    float* out = s.out + t * kStrip * width;
    const Product<Tile> product{s.weights, 1, kStrip, s.value, width, out, width, state.decay};
    if (s.started[t])
      product_ranges<Tile, Into::kScaleAndAdd>(product, rows, width, ranges);
    else
      product_ranges<Tile, Into::kOverwrite>(product, rows, width, ranges);
    s.started[t] = true;
  }

  void finish() {
    const float gate = prompt.gate(p, head);
    const bool prompted = gate != 0.f;
    if (prompted) {
      pack_prompt_rows<Tile>(p, p.prompt_key, prompt.row, head_kv, s.key);
      pack_prompt_lanes<Tile>(p, p.prompt_value, prompt.row, head_kv, s.value);
    }
    for (int64_t t = 0; t < strips; ++t) {
      const int64_t rows = strip_queries(t);
      float* out = s.out + t * kStrip * width;
      float inverse[kStrip];
      write_lse(t, rows, inverse);
      if (!s.started[t]) __builtin_memset(out, 0, static_cast<size_t>(rows * width) * sizeof(float));
      if (prompted) add_prompt(t, rows, gate, inverse);
      visit_rows(sequence.query_row(p.out, head, first + t * kStrip), p.out.token, p.out.dtype, [&](auto to) {
        for (int64_t i = 0; i < rows; ++i) {
          store_columns(out + i * width, broadcast(prompted ? 1.f : inverse[i]), p.head_dim, to[i]);
        }
      });
    }
  }

  void write_lse(int64_t t, int64_t rows, float* inverse) {
    const SoftmaxState& state = s.states[t];
    float* lse = p.lse + sequence.lse_index(p.num_heads_q, head, first + t * kStrip);
    for (int64_t i = 0; i < rows; ++i) {
      const float sum = state.sum[i];
      const double maximum = static_cast<double>(state.maximum[i]) * static_cast<double>(how.remaining);
      inverse[i] = sum == 0.f ? 0.f : 1.f / sum;
      lse[i] =
          sum == 0.f ? -kInfinity : static_cast<float>(maximum + static_cast<double>(__builtin_logf(sum)));
    }
  }

  // out = inverse * out + gate * softmax(scale q pk^T) pv
  void add_prompt(int64_t t, int64_t rows, float gate, const float* inverse) {
    const int64_t P = p.prompt_length;
    product_rows<Tile, Into::kOverwrite, 2>(
        {s.key, width / Tile::kPack, 1, s.query + t * strip_units, kStrip, s.scores, kStrip}, 0, P, 0, steps);
    for (int64_t lane = 0; lane < kStrip; lane += kLanes) {
      prompt_softmax_column(P, p.scale, s.scores + lane, kStrip);
      const WeightStore<Tile> out{s.weights, kStrip};
      const auto weight = [&](int64_t j) {
        return j < P ? load(s.scores + j * kStrip + lane) * broadcast(gate) : broadcast(0.f);
      };
      for (int64_t j = 0; j < P; j += 2) out.pair(j, lane, weight(j), weight(j + 1));
    }
    Range ranges[kStrip / kRows + 1];
    for (Range& range : ranges) range = {0, ceil_div(P, Tile::kPack)};
    product_ranges<Tile, Into::kScaleAndAdd>(
        {s.weights, 1, kStrip, s.value, width, s.out + t * kStrip * width, width, inverse}, rows, width,
        ranges);
  }

  const ForwardParams& p;
  const ForwardScratch<Tile> s;
  const Sequence sequence;
  const Visibility visible;
  const Prompt prompt;
  const ScoreScale how;
  const int64_t head, head_kv, first, queries, strips, width, steps, strip_units;
};

inline int64_t forward_blocks(const ForwardParams& p) { return ceil_div(p.seqlen_q, kForwardQueries); }

int64_t forward_items(const ForwardParams& p) { return p.num_sequences * p.num_heads_q * forward_blocks(p); }

int64_t forward_scratch(const ForwardParams& p) {
  int64_t bytes = 0;
  with_tile(p.query, [&](auto tile) { bytes = ForwardScratch<decltype(tile)>(p, nullptr).bytes; });
  return bytes;
}

void forward_run(const ForwardParams& p, int64_t begin, int64_t end, void* scratch) {
  const int64_t blocks = forward_blocks(p);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block =
        blocks - 1 - item % blocks;  // a causal mask makes the last one the most work: first
    const int64_t head = item / blocks % p.num_heads_q, b = item / blocks / p.num_heads_q;
    with_tile(p.query, [&](auto tile) { ForwardBlock<decltype(tile)>(p, b, head, block, scratch).run(); });
  }
}

}  // namespace
}  // namespace zinit::cpu
