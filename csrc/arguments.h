// The arguments that operators share, checked and put into the parameter structs: the same for CPU and CUDA.
// The public functions have checked them already, in the user's words. These checks keep a direct call of an
// operator from reading or writing out of bounds. What needs the elements of a tensor is checked in
// cpu/arguments.h; CUDA kernels clamp instead, because the host would have to wait for the device.
#pragma once
#include "checks.h"
#include "memory.h"

namespace zinit {

// The prompts and gates of all rows of the table.
inline void set_prompt_table(AttentionParams& w, const Device& device, Layout layout, const Tensor& key,
                             const Tensor& value, const Tensor& gate) {
  w.prompt_key = device.view(key, "prompt_key", layout);
  w.prompt_value = device.view(value, "prompt_value", layout);
  const int64_t N = key.size(0), P = key.size(token_dimension(layout)), Hkv = w.num_heads_kv;
  const bool head_major = layout == Layout::kHeadMajor;
  const std::initializer_list<int64_t> shape = {N, head_major ? Hkv : P, head_major ? P : Hkv, w.head_dim};
  check_shape(key, "prompt_key", shape);
  check_shape(value, "prompt_value", shape);
  w.prompt_rows = N, w.prompt_length = P;
  ZINIT_CHECK(P <= 128, "prompt_key must hold at most 128 prompts, got ", P);
  ZINIT_CHECK(w.prompt_key.dtype == w.prompt_value.dtype,
              "prompt_key and prompt_value must have one dtype, got ", key.scalar_type(), " and ",
              value.scalar_type());
  const bool has_rows = gate.dim() == 2;
  w.gate_rows = has_rows ? gate.size(0) : 1;
  const Array<const float> gates =
      has_rows ? device.array<float>(gate, "gate", ScalarType::Float, {w.gate_rows, w.num_heads_q})
               : device.array<float>(gate, "gate", ScalarType::Float, {w.num_heads_q});
  w.gate = gates.data;
  ZINIT_CHECK(w.gate_rows == 1 || w.gate_rows == N, "gate must have 1 row or one per prompt table row (", N,
              "), got ", w.gate_rows);
}

// Whether each sequence has a row of the table, or there is one for all.
inline void check_prompt_rows(const AttentionParams& w) {
  ZINIT_CHECK(w.prompt_index.given || w.prompt_rows == 1 || w.prompt_rows == w.num_sequences,
              "prompt_key must have 1 row or one per sequence (", w.num_sequences,
              ") where no prompt_index is given, got ", w.prompt_rows);
}

inline void set_prompt(AttentionParams& w, const Device& device, Layout layout, const OptionalTensor& key,
                       const OptionalTensor& value, const OptionalTensor& gate, const OptionalTensor& index) {
  ZINIT_CHECK(key.has_value() == value.has_value() && key.has_value() == gate.has_value(),
              "prompt_key, prompt_value and gate must be given together or not at all");
  ZINIT_CHECK(key.has_value() || !index.has_value(), "prompt_index needs prompt_key");
  if (!key.has_value()) return;
  set_prompt_table(w, device, layout, *key, *value, *gate);
  w.prompt_index = device.array<int32_t>(index, "prompt_index", ScalarType::Int, {w.num_sequences});
  check_prompt_rows(w);
}

inline Footprint footprint_of(const Tensor& tensor, const void* data) {
  Footprint f{reinterpret_cast<uintptr_t>(data), static_cast<int64_t>(tensor.element_size()), {}, {}};
  for (int64_t i = 0; i < 4; ++i) {
    f.sizes[static_cast<size_t>(i)] = tensor.size(i), f.strides[static_cast<size_t>(i)] = tensor.stride(i);
  }
  return f;
}

// New keys and values are written at places of their own, where nothing else that the call reads lies.
inline void check_apart(const DecodeParams& w, const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& query, const OptionalTensor& new_key, const OptionalTensor& new_value,
                        const OptionalTensor& prompt_key, const OptionalTensor& prompt_value) {
  if (!w.new_key.given) return;
  const Footprint keys = footprint_of(key_cache, w.key_cache.data);
  const Footprint values = footprint_of(value_cache, w.value_cache.data);
  ZINIT_CHECK(
      !share_memory(keys, values) && !overlaps_itself(keys) && !overlaps_itself(values),
      "key_cache and value_cache must share no memory, and have a place for each element, where new_key "
      "is given");
  const auto check = [&](const Tensor& tensor, const char* name, const void* data) {
    const Footprint read = footprint_of(tensor, data);
    ZINIT_CHECK(!share_memory(keys, read) && !share_memory(values, read), name,
                " must share no memory with key_cache and value_cache, where new_key is given");
  };
  check(query, "query", w.query.data);
  check(*new_key, "new_key", w.new_key.data), check(*new_value, "new_value", w.new_value.data);
  if (!prompt_key.has_value()) return;
  check(*prompt_key, "prompt_key", w.prompt_key.data);
  check(*prompt_value, "prompt_value", w.prompt_value.data);
}

inline void set_sinks(AttentionParams& w, const Device& device, const OptionalTensor& sinks) {
  w.sinks = device.array<float>(sinks, "sinks", ScalarType::Float, {w.num_heads_q});
}

// `by_token`: whether there is a causal mask or a window.
inline void set_rotary(DecodeParams& w, const Device& device, const OptionalTensor& cos,
                       const OptionalTensor& sin, bool interleaved, bool by_token) {
  ZINIT_CHECK(cos.has_value() == sin.has_value(),
              "rotary_cos and rotary_sin must be given together, or neither");
  if (!cos.has_value()) return;
  Rotary& rotary = w.rotary;
  const ScalarType dtype = cos->scalar_type();
  rotary.cos = device.array<void>(*cos, "rotary_cos", dtype, {-1, -1}).data;
  rotary.dtype = dtype_of(*cos, "rotary_cos");
  rotary.positions = cos->size(0), rotary.stride = cos->size(1), rotary.dim = 2 * cos->size(1);
  rotary.sin = device.array<void>(*sin, "rotary_sin", dtype, {rotary.positions, rotary.stride}).data;
  rotary.interleaved = interleaved, rotary.by_token = by_token, rotary.given = true;
  ZINIT_CHECK(rotary.dim <= w.head_dim, "rotary_cos must have at most ", w.head_dim / 2, " columns, got ",
              cos->size(1));
}

}  // namespace zinit
