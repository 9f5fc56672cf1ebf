// What a thread takes of the gradients: the splits of a key head, each repeated with care where its inputs ask for it.
#pragma once
#include "backward.h"

namespace zinit::cpu {
namespace {

int64_t backward_items(const BackwardWork& w) { return w.num_sequences * w.num_heads_kv * w.units(); }

int64_t backward_scratch(const BackwardWork& w) { return scratch_of_tiles<BackwardScratch>(w); }

// A split whose inputs hold special numbers; apart from the code for all others, which is faster without it.
template <class Tile>
[[gnu::noinline, gnu::cold]] void repeat_split(const BackwardWork& w, int64_t b, int64_t kv_head,
                                               int64_t split, void* scratch, bool flushes) {
  if (!flushes) {
    BackwardUnit<Tile, true> careful(w, b, kv_head, scratch);
    careful.run(split);
    flushes = careful.may_flush(split);
  }
  if (flushes) BackwardUnit<FloatTile, true>(w, b, kv_head, scratch).run(split);
}

void backward_run(const BackwardWork& w, int64_t begin, int64_t end, void* scratch) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t last =
        w.splits - item % w.units();  // with a causal mask the last one is the most work: first
    const Range splits = w.in_turn ? Range{0, w.splits} : Range{last - 1, last};
    const int64_t kv_head = item / w.units() % w.num_heads_kv, b = item / w.units() / w.num_heads_kv;
    with_tile(w.query, [&](auto tile) {
      using Tile = decltype(tile);
      BackwardUnit<Tile, false> unit(w, b, kv_head, scratch);
      for (int64_t split = splits.begin; split < splits.end; ++split) {
        unit.run(split);
        // Asked for each split, so that the bits do not depend on how many a unit takes.
        const bool flushes = unit.may_flush(split);
        if (flushes || !unit.is_finite()) repeat_split<Tile>(w, b, kv_head, split, scratch, flushes);
        unit.forget();
        if (split > splits.begin) unit.add_to_first_sum();
      }
      if (w.in_turn) unit.finish_keys();
    });
  }
}

}  // namespace
}  // namespace zinit::cpu
