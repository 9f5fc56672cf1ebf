// out = softmax(scale q k^T + mask) v + act(gate) softmax(scale q pk^T) pv, and the token branch's lse.
//
// An item is a block of queries of one head. Key blocks pass through it with an online softmax. The product
// of a strip's last block takes the prompts with it, divides by the token denominator and writes the result:
// no further pass over the accumulator.
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

// Of a strip.
enum class Progress { kNone, kStarted, kFinished };

// How a strip's last product becomes rows of the result: (decay * accumulated + tokens) * inverse + prompts.
template <class T>
struct Finish {
  const float* accumulated;  // [rows][width]; nullptr: there was no block before
  int64_t width;
  const float *decay, *inverse;
  Range also;  // the prompts
  Rows<T> out;
  int64_t head_dim;

  void operator()(int64_t row, int64_t lane, Vec tokens, Vec prompts) const {
    if (accumulated) tokens = fma(load(accumulated + row * width + lane), broadcast(decay[row]), tokens);
    const Vec sum = fma(tokens, broadcast(inverse[row]), prompts);
    if (lane + kLanes <= head_dim)
      store(out[row] + lane, sum);
    else
      store_first(out[row] + lane, head_dim - lane, sum);
  }
};

template <class Tile>
struct ForwardScratch {
  using Unit = typename Tile::Unit;
  Unit* query;    // [strips][transposed]
  float* out;     // [kForwardQueries][width]
  Unit* key;      // rows; those of a block, then the prompts
  Unit* value;    // lanes, the same
  float* scores;  // [keys][kStrip], the same
  Unit* weights;  // units along the keys, the same
  SoftmaxState* states;
  Progress* progress;
  int64_t bytes;

  ForwardScratch(const AttentionParams& p, void* memory) {
    const int64_t width = round_up(p.head_dim, kLanes),
                  steps = round_up(width, Tile::kPack * kLanes) / Tile::kPack;
    const int64_t keys = kForwardKeys + round_up(p.prompt_length, 2);
    Arena arena{static_cast<char*>(memory)};
    query = arena.take<Unit>(kForwardStrips * steps * kStrip);
    out = arena.take<float>(kForwardQueries * width);
    key = arena.take<Unit>(keys * width / Tile::kPack);
    value = arena.take<Unit>(keys * width / Tile::kPack);
    scores = arena.take<float>(keys * kStrip);
    weights =
        Tile::kPack == 1 ? reinterpret_cast<Unit*>(scores) : arena.take<Unit>(keys / Tile::kPack * kStrip);
    states = arena.take<SoftmaxState>(kForwardStrips);
    progress = arena.take<Progress>(kForwardStrips);
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
        gate(prompt.gate(params, head)),
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
    for (int64_t t = 0; t < strips; ++t) s.states[t].reset(), s.progress[t] = Progress::kNone;
    if (gate != 0.f) {
      pack_prompt_rows<Tile>(p, p.prompt_key, prompt.row, head_kv, prompt_key());
      pack_prompt_lanes<Tile>(p, p.prompt_value, prompt.row, head_kv,
                              s.value + kForwardKeys / Tile::kPack * width);
    }
    const int64_t end = visible.upper(first + queries - 1);
    for (int64_t block = visible.lower(first); block < end; block += kForwardKeys) {
      attend(block, min(kForwardKeys, end - block));
    }
    for (int64_t t = 0; t < strips; ++t) {
      constexpr Range kNothing[kStrip / kRows + 1] = {};
      if (s.progress[t] != Progress::kFinished) finish_strip(t, kNothing);  // one that sees no key
    }
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
    if (block + count >= visible.upper(first_row + rows - 1)) return finish_strip(t, ranges);
    float* out = s.out + t * kStrip * width;
    if (s.progress[t] == Progress::kStarted)
      product_ranges<Tile>(weighted_values(), ScaleAndAdd{out, width, state.decay}, rows, width, ranges);
    else
      product_ranges<Tile>(weighted_values(), Overwrite{out, width}, rows, width, ranges);
    s.progress[t] = Progress::kStarted;
  }

  // The product over the last block's keys, `ranges` of each group of queries, and over the prompts.
  void finish_strip(int64_t t, const Range* ranges) {
    const int64_t rows = strip_queries(t);
    float inverse[kStrip];
    write_lse(t, rows, inverse);
    Range prompts{0, 0};
    if (gate != 0.f) {
      prompt_weights(t);
      prompts = {kForwardKeys / Tile::kPack,
                 kForwardKeys / Tile::kPack + ceil_div(p.prompt_length, Tile::kPack)};
    }
    const float* accumulated = s.progress[t] == Progress::kStarted ? s.out + t * kStrip * width : nullptr;
    visit_rows(sequence.query_row(p.out, head, first + t * kStrip), p.out.token, p.out.dtype, [&](auto out) {
      const Finish finish{accumulated, width, s.states[t].decay, inverse, prompts, out, p.head_dim};
      product_ranges<Tile>(weighted_values(), finish, rows, width, ranges);
    });
    s.progress[t] = Progress::kFinished;
  }

  Product<Tile> weighted_values() const { return {s.weights, 1, kStrip, s.value, width}; }
  Unit* prompt_key() const { return s.key + kForwardKeys * width / Tile::kPack; }

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

  // Behind the weights of the block: gate * softmax(scale q pk^T).
  void prompt_weights(int64_t t) {
    const int64_t P = p.prompt_length;
    float* scores = s.scores + kForwardKeys * kStrip;
    product_rows<Tile, 2>({prompt_key(), width / Tile::kPack, 1, s.query + t * strip_units, kStrip},
                          Overwrite{scores, kStrip}, 0, P, 0, steps);
    const WeightStore<Tile> out{s.weights + kForwardKeys / Tile::kPack * kStrip, kStrip};
    for (int64_t lane = 0; lane < kStrip; lane += kLanes) {
      prompt_softmax_column(P, p.scale, scores + lane, kStrip);
      const auto weight = [&](int64_t j) {
        return j < P ? load(scores + j * kStrip + lane) * broadcast(gate) : broadcast(0.f);
      };
      for (int64_t j = 0; j < P; j += 2) out.pair(j, lane, weight(j), weight(j + 1));
    }
  }

  const ForwardParams& p;
  const ForwardScratch<Tile> s;
  const Sequence sequence;
  const Visibility visible;
  const Prompt prompt;
  const ScoreScale how;
  const int64_t head;
  const float gate;  // 0: no prompts
  const int64_t head_kv, first, queries, strips, width, steps, strip_units;
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
