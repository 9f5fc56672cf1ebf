// zinit::forward_cpu and zinit::backward_cpu: tensors in, parameter structs to the kernels, tensors out.
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "plan.h"
#include "run_stage.h"

namespace zinit::cpu {
namespace {

// Queries, keys, values and what says where each sequence lies in them.
template <class Params>
void set_tokens(Params& w, const Device& device, const Tensor& query, const Tensor& key, const Tensor& value,
                const OptionalTensor& key_bias, const OptionalTensor& cu_seqlens_q,
                const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                Copies& copies) {
  w.query = device.view(query, "query", Layout::kHeadMajor);
  w.key = device.view(key, "key", Layout::kHeadMajor);
  w.value = device.view(value, "value", Layout::kHeadMajor);
  ZINIT_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
              "cu_seqlens_q and cu_seqlens_k must be given together or not at all");
  const bool packed = cu_seqlens_q.has_value();
  const int64_t batch = query.size(0);
  w.num_heads_q = query.size(1);
  w.num_heads_kv = key.size(1);
  w.head_dim = query.size(3);
  ZINIT_CHECK(w.head_dim >= 1 && w.head_dim <= 256, "query must have a head dimension of 1 to 256, got ",
              w.head_dim);
  ZINIT_CHECK(w.num_heads_kv >= 1 && w.num_heads_q % w.num_heads_kv == 0,
              "query must have a multiple of the heads of key (", w.num_heads_kv, "), got ", w.num_heads_q);
  check_shape(key, "key", {batch, w.num_heads_kv, -1, w.head_dim});
  check_shape(value, "value", {batch, w.num_heads_kv, key.size(2), w.head_dim});
  ZINIT_CHECK(w.key.dtype == w.query.dtype && w.value.dtype == w.query.dtype,
              "key and value must have the dtype of query, ", query.scalar_type(), ", got ",
              key.scalar_type(), " and ", value.scalar_type());
  w.cu_seqlens_q = device.array<int32_t>(cu_seqlens_q, "cu_seqlens_q", ScalarType::Int, {-1});
  w.cu_seqlens_k = device.array<int32_t>(cu_seqlens_k, "cu_seqlens_k", ScalarType::Int, {-1});
  w.num_sequences = packed ? cu_seqlens_q->size(0) - 1 : batch;
  w.seqlen_q = packed ? max_seqlen_q : query.size(2);
  w.seqlen_k = packed ? max_seqlen_k : key.size(2);
  if (packed) {
    ZINIT_CHECK(batch == 1, "packed sequences must have a leading dimension of 1, got query of shape ",
                shape_string(query));
    ZINIT_CHECK(w.num_sequences >= 0, "cu_seqlens_q must have shape (sequences + 1), got ",
                shape_string(*cu_seqlens_q));
    check_shape(*cu_seqlens_k, "cu_seqlens_k", {w.num_sequences + 1});
    copy_cumulative(w.cu_seqlens_q, "cu_seqlens_q", w.num_sequences, w.seqlen_q, query.size(2), copies);
    copy_cumulative(w.cu_seqlens_k, "cu_seqlens_k", w.num_sequences, w.seqlen_k, key.size(2), copies);
  }
  w.key_bias = device.array<float>(key_bias, "key_bias", ScalarType::Float, {w.num_sequences, w.seqlen_k});
  if (packed) {  // work and workspace follow what is there, whatever bound was given
    w.seqlen_q = longest_of(w.cu_seqlens_q, w.num_sequences);
    if (!w.key_bias.given) w.seqlen_k = longest_of(w.cu_seqlens_k, w.num_sequences);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const OptionalTensor& prompt_key, const OptionalTensor& prompt_value,
                                   const OptionalTensor& gate, const OptionalTensor& sinks,
                                   const OptionalTensor& prompt_index, const OptionalTensor& key_bias,
                                   const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                   int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, double softcap,
                                   int64_t window_left, int64_t window_right, bool tanh_gate) {
  const Device device = Device::cpu();
  ForwardParams w{};
  Copies copies;
  set_tokens(w, device, query, key, value, key_bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
             copies);
  set_mask(w, scale, softcap, window_left, window_right, tanh_gate);
  set_prompt(w, device, Layout::kHeadMajor, prompt_key, prompt_value, gate, prompt_index);
  copy_prompt_index(w, copies);
  set_sinks(w, device, sinks);
  const int64_t batch = query.size(0), rows = query.size(2);
  Tensor out = device.empty_token_major(batch, w.num_heads_q, rows, w.head_dim, query.scalar_type());
  Tensor lse = device.empty_contiguous({batch, w.num_heads_q, rows}, ScalarType::Float);
  w.out = device.view(out, "out", Layout::kHeadMajor);
  w.lse = static_cast<float*>(lse.mutable_data_ptr());
  run_stage(kernels().forward, w);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out, const Tensor& lse,
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& prompt_key,
    const OptionalTensor& prompt_value, const OptionalTensor& gate, const OptionalTensor& sinks,
    const OptionalTensor& prompt_index, const OptionalTensor& key_bias, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
    double softcap, int64_t window_left, int64_t window_right, bool tanh_gate, int64_t needs) {
  const Device device = Device::cpu();
  BackwardWork w{};
  Copies copies;
  set_tokens(w, device, query, key, value, key_bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
             copies);
  set_mask(w, scale, softcap, window_left, window_right, tanh_gate);
  set_prompt(w, device, Layout::kHeadMajor, prompt_key, prompt_value, gate, prompt_index);
  copy_prompt_index(w, copies);
  set_sinks(w, device, sinks);
  const int64_t batch = query.size(0), rows = query.size(2), keys = key.size(2), D = w.head_dim;
  w.out = device.view(out, "out", Layout::kHeadMajor);
  w.grad_out = device.view(grad_out, "grad_out", Layout::kHeadMajor);
  check_shape(out, "out", {batch, w.num_heads_q, rows, D});
  check_shape(grad_out, "grad_out", {batch, w.num_heads_q, rows, D});
  ZINIT_CHECK(w.out.dtype == w.query.dtype && w.grad_out.dtype == w.query.dtype,
              "out and grad_out must have the dtype of query, ", query.scalar_type(), ", got ",
              out.scalar_type(), " and ", grad_out.scalar_type());
  w.lse = device.array<float>(lse, "lse", ScalarType::Float, {batch, w.num_heads_q, rows}).data;
  w.grad_lse = device.array<float>(grad_lse, "grad_lse", ScalarType::Float, {batch, w.num_heads_q, rows});

  const auto wanted = [&](int bit) {
    const bool given = bit < 3 || (bit < 6 ? prompt_key.has_value() : sinks.has_value());
    return (needs >> bit & 1) != 0 && given;
  };
  const auto gradient = [&](int bit, View& view, auto allocate) {
    Tensor grad = wanted(bit) ? allocate() : device.empty_contiguous({0}, ScalarType::Float);
    if (wanted(bit)) view = device.view(grad, "gradient", Layout::kHeadMajor);
    return grad;
  };
  const auto token_major = [&](int64_t heads, int64_t tokens) {
    return [=, &query] { return device.empty_token_major(batch, heads, tokens, D, query.scalar_type()); };
  };
  const auto contiguous = [&](const OptionalTensor& prompt) {
    return [&] {
      return device.empty_contiguous({w.prompt_rows, w.num_heads_kv, w.prompt_length, D},
                                     prompt->scalar_type());
    };
  };
  Tensor grad_query = gradient(0, w.grad_query, token_major(w.num_heads_q, rows));
  Tensor grad_key = gradient(1, w.grad_key, token_major(w.num_heads_kv, keys));
  Tensor grad_value = gradient(2, w.grad_value, token_major(w.num_heads_kv, keys));
  Tensor grad_prompt_key = gradient(3, w.grad_prompt_key, contiguous(prompt_key));
  Tensor grad_prompt_value = gradient(4, w.grad_prompt_value, contiguous(prompt_value));
  const auto array_gradient = [&](int bit, Array<float>& array, const std::vector<int64_t>& sizes) {
    Tensor grad = device.empty_contiguous(wanted(bit) ? sizes : std::vector<int64_t>{0}, ScalarType::Float);
    if (wanted(bit)) array = {static_cast<float*>(grad.mutable_data_ptr()), true};
    return grad;
  };
  Tensor grad_gate = array_gradient(5, w.grad_gate, {w.gate_rows, w.num_heads_q});
  Tensor grad_sinks = array_gradient(6, w.grad_sinks, {w.num_heads_q});

  plan_backward(w, torch::stable::get_num_threads());
  const BackwardWorkspace workspace(w);
  Tensor floats = device.empty_contiguous({workspace.floats()}, ScalarType::Float);
  workspace.give_to(w, static_cast<float*>(floats.mutable_data_ptr()));
  run_stage(kernels().backward, w);
  run_stage(kernels().backward_reduce, w);
  return {grad_query, grad_key, grad_value, grad_prompt_key, grad_prompt_value, grad_gate, grad_sinks};
}

}  // namespace
}  // namespace zinit::cpu

// For tensors of every kind, so that what is no CPU tensor is refused by name, and not by the dispatcher.
STABLE_TORCH_LIBRARY_IMPL(zinit, CompositeExplicitAutograd, m) {
  m.impl("forward_cpu", TORCH_BOX(&zinit::cpu::forward));
  m.impl("backward_cpu", TORCH_BOX(&zinit::cpu::backward));
}
