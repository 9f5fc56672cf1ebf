// The arguments that the operators share, checked and put into AttentionParams. The public functions have
// checked them with better words; what is checked here keeps a direct call of an operator from reading or
// writing out of bounds.
#pragma once
#include <algorithm>

#include "../torch_stable.h"

namespace zinit::cpu {

inline void set_prompt(AttentionParams& p, const OptionalTensor& prompt_key,
                       const OptionalTensor& prompt_value, const OptionalTensor& gate,
                       const OptionalTensor& prompt_index, Layout layout = Layout::kHeadMajor) {
  p.prompt_key = p.prompt_value = View{};
  p.prompt_length = p.prompt_rows = p.gate_rows = 0;
  p.prompt_index = nullptr;
  p.gate = nullptr;
  STD_TORCH_CHECK(
      prompt_key.has_value() == prompt_value.has_value() && prompt_key.has_value() == gate.has_value(),
      "prompt_key, prompt_value and gate must be given together or not at all");
  STD_TORCH_CHECK(prompt_key.has_value() || !prompt_index.has_value(), "prompt_index needs prompt_key");
  if (!prompt_key.has_value()) return;
  p.prompt_key = view_of(*prompt_key, "prompt_key", layout);
  p.prompt_value = view_of(*prompt_value, "prompt_value", layout);
  p.prompt_rows = prompt_key->size(0);
  p.prompt_length = prompt_key->size(token_dimension(layout));
  const bool head_major = layout == Layout::kHeadMajor;
  const int64_t first = head_major ? p.num_heads_kv : p.prompt_length;
  const int64_t second = head_major ? p.prompt_length : p.num_heads_kv;
  check_shape(*prompt_key, "prompt_key", {p.prompt_rows, first, second, p.head_dim});
  check_shape(*prompt_value, "prompt_value", {p.prompt_rows, first, second, p.head_dim});
  STD_TORCH_CHECK(p.prompt_length <= 128, "prompt_key must hold at most 128 prompts, got ", p.prompt_length);
  STD_TORCH_CHECK(p.prompt_key.dtype == p.prompt_value.dtype,
                  "prompt_key and prompt_value must have one dtype, got ", prompt_key->scalar_type(), " and ",
                  prompt_value->scalar_type());
  const bool has_rows = gate->dim() == 2;
  p.gate_rows = has_rows ? gate->size(0) : 1;
  p.gate = has_rows ? array_of<float>(gate, "gate", ScalarType::Float, {p.gate_rows, p.num_heads_q})
                    : array_of<float>(gate, "gate", ScalarType::Float, {p.num_heads_q});
  STD_TORCH_CHECK(p.gate_rows == 1 || p.gate_rows == p.prompt_rows,
                  "gate must have 1 row or one per prompt table row (", p.prompt_rows, "), got ",
                  p.gate_rows);
  p.prompt_index = array_of<int32_t>(prompt_index, "prompt_index", ScalarType::Int, {p.num_sequences});
  if (!prompt_index.has_value()) {  // not the pointer: an empty batch has an index without an address
    STD_TORCH_CHECK(p.prompt_rows == 1 || p.prompt_rows == p.num_sequences,
                    "prompt_key must have 1 row or one per sequence (", p.num_sequences,
                    ") where no prompt_index is given, got ", p.prompt_rows);
    return;
  }
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    STD_TORCH_CHECK(p.prompt_index[b] >= -1 && p.prompt_index[b] < p.prompt_rows,
                    "prompt_index must be -1 or below ", p.prompt_rows, ", got ", p.prompt_index[b],
                    " for sequence ", b);
  }
}

// Any window that reaches past every key is unlimited: -1.
inline void set_mask(AttentionParams& p, double scale, int64_t window_left, int64_t window_right,
                     bool tanh_gate) {
  const int64_t all = p.seqlen_q + p.seqlen_k;
  p.window_left = window_left < 0 || window_left >= all ? -1 : window_left;
  p.window_right = window_right < 0 || window_right >= all ? -1 : window_right;
  p.scale = static_cast<float>(scale);
  p.tanh_gate = tanh_gate;
}

// Boundaries of packed sequences: rising from 0, each sequence at most `longest` rows, all within `total`.
inline const int32_t* cumulative_lengths(const OptionalTensor& tensor, const char* name,
                                         int64_t num_sequences, int64_t longest, int64_t total) {
  const int32_t* cu = array_of<int32_t>(tensor, name, ScalarType::Int, {num_sequences + 1});
  if (cu == nullptr) return nullptr;
  STD_TORCH_CHECK(cu[0] == 0, name, " must begin with 0, got ", cu[0]);
  for (int64_t b = 0; b < num_sequences; ++b) {
    const int64_t length = static_cast<int64_t>(cu[b + 1]) - cu[b];
    STD_TORCH_CHECK(length >= 0 && length <= longest, name, " must rise by 0 to ", longest,
                    " (the longest sequence), got ", cu[b], " then ", cu[b + 1]);
  }
  STD_TORCH_CHECK(cu[num_sequences] == total, name, " must end with the number of rows, ", total, ", got ",
                  cu[num_sequences]);
  return cu;
}

inline int64_t longest_of(const int32_t* cu_seqlens, int64_t num_sequences) {
  int64_t longest = 0;
  for (int64_t b = 0; b < num_sequences; ++b) {
    longest = std::max<int64_t>(longest, cu_seqlens[b + 1] - cu_seqlens[b]);
  }
  return longest;
}

}  // namespace zinit::cpu
