// The prompt branch: a softmax of its own over P <= 128 keys, which every query sees.
#pragma once
#include "../params.h"
#include "sequence.h"
#include "softcap.h"
#include "tiles.h"

namespace zinit::cpu {
namespace {

// The prompt rows of one sequence and key head, packed as rows or as lanes.
template <class Tile>
inline void pack_prompt_rows(const AttentionParams& w, const View& table, int64_t row, int64_t head,
                             typename Tile::Unit* to) {
  visit_rows(row_pointer(table, row, head, 0), table.token, table.dtype,
             [&](auto rows) { Tile::pack_rows(rows, w.prompt_length, w.head_dim, nullptr, to); });
}

template <class Tile>
inline void pack_prompt_lanes(const AttentionParams& w, const View& table, int64_t row, int64_t head,
                              typename Tile::Unit* to) {
  visit_rows(row_pointer(table, row, head, 0), table.token, table.dtype,
             [&](auto rows) { Tile::pack_lanes(rows, w.prompt_length, w.head_dim, nullptr, to); });
}

// In place: softmax over the prompts' rows of one vector of queries. `slopes` as for cap_scores.
inline void prompt_softmax_column(const AttentionParams& w, float* scores, int64_t score_row,
                                  float* slopes = nullptr) {
  const int64_t P = w.prompt_length;
  const bool capped = w.softcap > 0.f;
  if (capped) cap_scores(0, P, w.scale, w.softcap, scores, score_row, slopes);
  // of either sign, so the products come before the maximum
  const Vec factor = broadcast((capped ? 1.f : w.scale) * kLog2E);
  Vec m = broadcast(-kInfinity);
  for (int64_t j = 0; j < P; ++j) {
    const Vec x = load(scores + j * score_row) * factor;
    store(scores + j * score_row, x);
    m = max(m, x);
  }
  Vec l = broadcast(0.f);
  for (int64_t j = 0; j < P; ++j) {
    const Vec p = exp2(load(scores + j * score_row) - m);
    l = l + p;
    store(scores + j * score_row, p);
  }
  const Vec inverse = broadcast(1.f) / l;
  for (int64_t j = 0; j < P; ++j) store(scores + j * score_row, load(scores + j * score_row) * inverse);
}

}  // namespace
}  // namespace zinit::cpu
