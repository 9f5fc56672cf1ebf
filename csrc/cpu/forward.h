// out = softmax(scale q k^T + mask) v + act(gate) softmax(scale q pk^T) pv, and the token branch's lse.
//
// An item is a block of queries of one head. Blocks of keys pass through it with an online softmax
// (softmax.h). The product of a strip's last block also takes the prompts, divides by l and writes the
// result: no further pass over acc.
#pragma once
#include "kernels.h"
#include "prompt.h"
#include "softmax.h"
#include "special.h"

namespace zinit::cpu {
namespace {

// Measured on Zen 4: more queries in an item read the keys less often, and 4 strips of 128 columns still fit
// the L2.
constexpr int64_t kForwardQueries = 128;
constexpr int64_t kForwardStrips = kForwardQueries / kStrip;
constexpr int64_t kForwardKeys = 64;

// Of a strip.
enum class Progress { kNone, kStarted, kFinished };

// How a strip's last product becomes rows of the result: (alpha * acc + tokens) * inverse + prompts.
template <class Tile, class T>
struct Finish {
  using Seen = Extremes<Tile::kFlushes>;
  const float* acc;  // [rows][width]; nullptr: there was no block before
  int64_t width;
  const float *alpha, *inverse;
  Range also;  // the prompts
  Rows<T> out;
  int64_t head_dim;
  Seen* seen;  // of the item

  void operator()(int64_t row, int64_t lane, Vec tokens, Vec prompts, bool leads, Seen& noted) const {
    if (acc) tokens = fma(load(acc + row * width + lane), broadcast(alpha[row]), tokens);
    const Vec sum = fma(tokens, broadcast(inverse[row]), prompts);
    if (lane + kLanes <= head_dim) {
      Tile::store_result(out[row] + lane, sum);
      noted.note(sum, leads);
    } else {
      store_first(out[row] + lane, head_dim - lane, sum);
      noted.note_first(sum, head_dim - lane, leads);
    }
  }
};

template <class Tile>
struct ForwardScratch {
  using Unit = typename Tile::Unit;
  Unit* query;    // [strips][transposed]
  float* acc;     // [kForwardQueries][width]
  Unit* key;      // rows: those of a block, then the prompts
  Unit* value;    // lanes, the same
  float* scores;  // [keys][kStrip], the same
  Unit* p;        // weights as units along the keys, the same
  SoftmaxState* states;
  Progress* progress;
  int64_t bytes;

  ForwardScratch(const AttentionParams& w, void* memory) {
    const int64_t width = round_up(w.head_dim, kLanes);
    const int64_t steps = round_up(width, Tile::kPack * kLanes) / Tile::kPack;
    const int64_t keys = kForwardKeys + round_up(w.prompt_length, 2);
    Arena arena{static_cast<char*>(memory)};
    query = arena.take<Unit>(kForwardStrips * steps * kStrip);
    acc = arena.take<float>(kForwardQueries * width);
    key = arena.take<Unit>(keys * width / Tile::kPack);
    value = arena.take<Unit>(keys * width / Tile::kPack);
    scores = arena.take<float>(keys * kStrip);
    p = Tile::kPack == 1 ? reinterpret_cast<Unit*>(scores) : arena.take<Unit>(keys / Tile::kPack * kStrip);
    states = arena.take<SoftmaxState>(kForwardStrips);
    progress = arena.take<Progress>(kForwardStrips);
    bytes = arena.used;
  }
};

// kCareful: as special.h says, for inputs that are not all finite.
template <class Tile, bool kCareful>
class ForwardBlock {
  using Unit = typename Tile::Unit;

 public:
  ForwardBlock(const ForwardParams& params, int64_t b, int64_t head, int64_t query_block, void* memory)
      : w(params),
        s(params, memory),
        sequence(params, b),
        visible(params, sequence),
        prompt(params, b),
        how(params),
        head(head),
        gate(prompt.gate(params, head)),
        kv_head(head / (params.num_heads_q / params.num_heads_kv)),
        first(query_block * kForwardQueries),
        queries(min(kForwardQueries, sequence.queries - first)),
        strips(ceil_div(queries, kStrip)),
        width(round_up(params.head_dim, kLanes)),
        steps(ceil_div(params.head_dim, Tile::kPack)),
        strip_units(round_up(width, Tile::kPack * kLanes) / Tile::kPack * kStrip) {}

  void run() {
    if (queries <= 0) return;
    visit_rows(sequence.query_row(w.query, head, first), w.query.token, w.query.dtype, [&](auto rows) {
      for (int64_t t = 0; t < strips; ++t) {
        Tile::pack_transposed(rows.from(t * kStrip), strip_queries(t), w.head_dim, s.query + t * strip_units);
      }
    });
    for (int64_t t = 0; t < strips; ++t) s.states[t].reset(), s.progress[t] = Progress::kNone;
    if (gate != 0.f) {
      pack_prompt_rows<Tile>(w, w.prompt_key, prompt.row, kv_head, prompt_key());
      pack_prompt_lanes<Tile>(w, w.prompt_value, prompt.row, kv_head,
                              s.value + kForwardKeys / Tile::kPack * width);
    }
    const int64_t end = last_key();
    for (int64_t block = visible.lower(first); block < end; block += kForwardKeys) {
      attend(block, min(kForwardKeys, end - block));
    }
    for (int64_t t = 0; t < strips; ++t) {
      constexpr Range kNothing[kStrip / kRows] = {};
      if (s.progress[t] != Progress::kFinished) finish_strip(t, 0, 0, kNothing);  // one that sees no key
    }
  }

  // Whether all results are finite: no hidden value can have reached them.
  bool is_finite() const { return queries <= 0 || seen.is_finite(); }

  // Whether values that vdpbf16ps counts as 0 can have changed a result.
  bool may_flush() const {
    if (queries <= 0 || !seen.has_tiny()) return false;
    const int64_t begin = visible.lower(first);
    bool found = false;
    visit_rows(sequence.key_row(w.value, kv_head, begin), w.value.token, w.value.dtype,
               [&](auto rows) { found = has_tiny(rows, last_key() - begin, w.head_dim); });
    if (found || gate == 0.f) return found;
    const View& table = w.prompt_value;
    visit_rows(row_pointer(table, prompt.row, kv_head, 0), table.token, table.dtype,
               [&](auto rows) { found = has_tiny(rows, w.prompt_length, w.head_dim); });
    return found;
  }

 private:
  int64_t strip_queries(int64_t t) const { return min(kStrip, queries - t * kStrip); }
  int64_t last_key() const { return visible.upper(first + queries - 1); }

  void attend(int64_t block, int64_t count) {
    const float* bias = sequence.bias_from(block);
    visit_rows(sequence.key_row(w.key, kv_head, block), w.key.token, w.key.dtype,
               [&](auto rows) { Tile::pack_rows(rows, count, w.head_dim, bias, s.key); });
    if (!kCareful) pack_values(block, count, bias);
    for (int64_t t = 0; t < strips; ++t) attend_strip(t, block, count, bias);
  }

  // Rows that the bias hides become zeros.
  void pack_values(int64_t block, int64_t count, const float* bias) {
    visit_rows(sequence.key_row(w.value, kv_head, block), w.value.token, w.value.dtype,
               [&](auto rows) { Tile::pack_lanes(rows, count, w.head_dim, bias, s.value); });
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
      softmax_column<Tile>(extents[v], how, s.scores, kStrip, lane, state, {s.p, kStrip}, kCareful);
    }
    Range ranges[kStrip / kRows];
    query_group_ranges<Tile>(visible, first_row, rows, block, count, ranges);
    if (block + count >= visible.upper(first_row + rows - 1)) return finish_strip(t, block, count, ranges);
    float* acc = s.acc + t * kStrip * width;
    if (s.progress[t] == Progress::kStarted) {
      add_values(ScaleAndAdd{acc, width, state.alpha}, t, block, count, ranges);
    } else {
      add_values(Overwrite{acc, width}, t, block, count, ranges);
    }
    s.progress[t] = Progress::kStarted;
  }

  // The product over the last block's keys, `ranges` of each group of queries, and over the prompts.
  void finish_strip(int64_t t, int64_t block, int64_t count, const Range* ranges) {
    const int64_t rows = strip_queries(t);
    float inverse[kStrip];
    write_lse(t, rows, inverse);
    Range prompts{0, 0};
    if (gate != 0.f) {
      prompt_weights(t);
      prompts = {kForwardKeys / Tile::kPack,
                 kForwardKeys / Tile::kPack + ceil_div(w.prompt_length, Tile::kPack)};
    }
    const float* acc = s.progress[t] == Progress::kStarted ? s.acc + t * kStrip * width : nullptr;
    const float* alpha = s.states[t].alpha;
    visit_rows(sequence.query_row(w.out, head, first + t * kStrip), w.out.token, w.out.dtype,
               [&]<class T>(Rows<T> out) {
                 add_values(Finish<Tile, T>{acc, width, alpha, inverse, prompts, out, w.head_dim, &seen}, t,
                            block, count, ranges);
               });
    s.progress[t] = Progress::kFinished;
  }

  // The weights of strip t times the values of the block, into what `into` says.
  template <class Into>
  void add_values(const Into& into, int64_t t, int64_t block, int64_t count, const Range* ranges) {
    const Product<Tile> product{s.p, 1, kStrip, s.value, width};
    const int64_t rows = strip_queries(t), first_row = first + t * kStrip;
    if (!kCareful) return product_ranges(product, into, rows, width, ranges);
    const float* bias = sequence.bias_from(block);
    if (visible.is_uniform(first_row, first_row + rows - 1)) {
      pack_values(block, count, bias);
      return product_ranges(product, into, rows, width, ranges);
    }
    for (int64_t i = 0; i < rows; ++i) {
      Hiding hiding(visible.lower(first_row + i) - block, visible.upper(first_row + i) - block);
      hiding.add(bias, count);
      pack_values(block, count, hiding.bias);
      product_of_row(product, into, i, width, ranges);
    }
  }

  Unit* prompt_key() const { return s.key + kForwardKeys * width / Tile::kPack; }

  void write_lse(int64_t t, int64_t rows, float* inverse) {
    const SoftmaxState& state = s.states[t];
    float* lse = w.lse + sequence.lse_index(w.num_heads_q, head, first + t * kStrip);
    float zeros = 0.f;
    for (int64_t i = 0; i < rows; ++i) {
      const double m = static_cast<double>(state.m[i]) * static_cast<double>(how.remaining);
      const RowEnd end = w.sinks.given ? end_row(m, state.l[i], w.sinks.data[head]) : end_row(m, state.l[i]);
      inverse[i] = end.factor;
      zeros += end.factor * 0.f;
      lse[i] = static_cast<float>(end.lse);
    }
    seen.note_zeros(zeros);
  }

  // Behind the weights of the block: gate * softmax(scale q pk^T).
  void prompt_weights(int64_t t) {
    const int64_t P = w.prompt_length;
    float* scores = s.scores + kForwardKeys * kStrip;
    product_rows<Tile, 2>({prompt_key(), width / Tile::kPack, 1, s.query + t * strip_units, kStrip},
                          Overwrite{scores, kStrip}, 0, P, 0, steps);
    const WeightStore<Tile> to{s.p + kForwardKeys / Tile::kPack * kStrip, kStrip};
    for (int64_t lane = 0; lane < kStrip; lane += kLanes) {
      prompt_softmax_column(w, scores + lane, kStrip);
      const auto weight = [&](int64_t j) {
        return j < P ? load(scores + j * kStrip + lane) * broadcast(gate) : broadcast(0.f);
      };
      for (int64_t j = 0; j < P; j += 2) to.pair(j, lane, weight(j), weight(j + 1));
    }
  }

  const ForwardParams& w;
  const ForwardScratch<Tile> s;
  const Sequence sequence;
  const Visibility visible;
  const Prompt prompt;
  const ScoreScale how;
  const int64_t head;
  const float gate;  // 0: no prompts
  const int64_t kv_head, first, queries, strips, width, steps, strip_units;
  Extremes<Tile::kFlushes> seen;
};

inline int64_t forward_blocks(const ForwardParams& w) { return ceil_div(w.seqlen_q, kForwardQueries); }

int64_t forward_items(const ForwardParams& w) { return w.num_sequences * w.num_heads_q * forward_blocks(w); }

int64_t forward_scratch(const ForwardParams& w) { return scratch_of_tiles<ForwardScratch>(w); }

// For inputs with special numbers; apart from the code for all others, which is faster without it.
template <class Tile>
[[gnu::noinline, gnu::cold]] void repeat_forward(const ForwardParams& w, int64_t b, int64_t head,
                                                 int64_t block, void* scratch, bool flushes) {
  if (!flushes) {
    ForwardBlock<Tile, true> careful(w, b, head, block, scratch);
    careful.run();
    flushes = careful.may_flush();
  }
  if (flushes) ForwardBlock<FloatTile, true>(w, b, head, block, scratch).run();
}

void forward_run(const ForwardParams& w, int64_t begin, int64_t end, void* scratch) {
  const int64_t blocks = forward_blocks(w);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t index =
        blocks - 1 - item % blocks;  // with a causal mask the last one is the most work: first
    const int64_t head = item / blocks % w.num_heads_q, b = item / blocks / w.num_heads_q;
    with_tile(w.query, [&](auto tile) {
      using Tile = decltype(tile);
      ForwardBlock<Tile, false> block(w, b, head, index, scratch);
      block.run();
      const bool flushes = block.may_flush();
      if (flushes || !block.is_finite()) repeat_forward<Tile>(w, b, head, index, scratch, flushes);
    });
  }
}

}  // namespace
}  // namespace zinit::cpu
