// The prompt branch: a softmax of its own over P <= 128 keys that every query sees.
#pragma once
#include "softmax.inl"

namespace zinit::cpu {
namespace {

constexpr int64_t kMaxPromptLength = 128;

// The prompt rows of one sequence and key head, packed. `values` differ: lanes in forward, rows in backward.
template <class Tile>
inline void pack_prompt_rows(const AttentionParams& p, const View& view, int64_t row, int64_t head,
                             typename Tile::Unit* to) {
  visit_rows(row_pointer(view, row, head, 0), view.token, view.dtype,
             [&](auto rows) { Tile::pack_rows(rows, p.prompt_length, p.head_dim, nullptr, to); });
}

template <class Tile>
inline void pack_prompt_lanes(const AttentionParams& p, const View& view, int64_t row, int64_t head,
                              typename Tile::Unit* to) {
  visit_rows(row_pointer(view, row, head, 0), view.token, view.dtype,
             [&](auto rows) { Tile::pack_lanes(rows, p.prompt_length, p.head_dim, nullptr, to); });
}

// In place, softmax over the P rows of one vector of queries.
inline void prompt_softmax_column(int64_t P, float scale, float* scores, int64_t score_row) {
  const Vec factor = broadcast(scale * kLog2E);  // of either sign, hence the products before the maximum
  Vec top = broadcast(-kInfinity);
  for (int64_t j = 0; j < P; ++j) {
    const Vec x = load(scores + j * score_row) * factor;
    store(scores + j * score_row, x);
    top = max(top, x);
  }
  Vec sum = broadcast(0.f);
  for (int64_t j = 0; j < P; ++j) {
    const Vec weight = exp2(load(scores + j * score_row) - top);
    sum = sum + weight;
    store(scores + j * score_row, weight);
  }
  const Vec inverse = broadcast(1.f) / sum;
  for (int64_t j = 0; j < P; ++j) store(scores + j * score_row, load(scores + j * score_row) * inverse);
}

}  // namespace
}  // namespace zinit::cpu
