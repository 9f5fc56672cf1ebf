// zinit::forward_cpu and zinit::backward_cpu: tensors in, parameter structs to the kernels, tensors out.
#include <tuple>
#include <utility>

#include "arguments.h"
#include "run_stage.h"

namespace zinit::cpu {
namespace {

// Queries, keys, values and what says where each sequence lies in them.
template <class Params>
void set_tokens(Params& p, const Device& device, const Tensor& query, const Tensor& key, const Tensor& value,
                const OptionalTensor& key_bias, const OptionalTensor& cu_seqlens_q,
                const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                Copies& copies) {
  p.query = device.view(query, "query", Layout::kHeadMajor);
  p.key = device.view(key, "key", Layout::kHeadMajor);
  p.value = device.view(value, "value", Layout::kHeadMajor);
  ZINIT_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
              "cu_seqlens_q and cu_seqlens_k must be given together or not at all");
  const bool packed = cu_seqlens_q.has_value();
  const int64_t batch = query.size(0);
  p.num_heads_q = query.size(1);
  p.num_heads_kv = key.size(1);
  p.head_dim = query.size(3);
  ZINIT_CHECK(p.head_dim >= 1 && p.head_dim <= 256, "query must have a head dimension of 1 to 256, got ",
              p.head_dim);
  ZINIT_CHECK(p.num_heads_kv >= 1 && p.num_heads_q % p.num_heads_kv == 0,
              "query must have a multiple of the heads of key (", p.num_heads_kv, "), got ", p.num_heads_q);
  check_shape(key, "key", {batch, p.num_heads_kv, -1, p.head_dim});
  check_shape(value, "value", {batch, p.num_heads_kv, key.size(2), p.head_dim});
  ZINIT_CHECK(p.key.dtype == p.query.dtype && p.value.dtype == p.query.dtype,
              "key and value must have the dtype of query, ", query.scalar_type(), ", got ",
              key.scalar_type(), " and ", value.scalar_type());
  p.cu_seqlens_q = device.array<int32_t>(cu_seqlens_q, "cu_seqlens_q", ScalarType::Int, {-1});
  p.cu_seqlens_k = device.array<int32_t>(cu_seqlens_k, "cu_seqlens_k", ScalarType::Int, {-1});
  p.num_sequences = packed ? cu_seqlens_q->size(0) - 1 : batch;
  p.seqlen_q = packed ? max_seqlen_q : query.size(2);
  p.seqlen_k = packed ? max_seqlen_k : key.size(2);
  if (packed) {
    ZINIT_CHECK(batch == 1, "packed sequences must have a leading dimension of 1, got query of shape ",
                shape_string(query));
    ZINIT_CHECK(p.num_sequences >= 0, "cu_seqlens_q must have shape (sequences + 1), got ",
                shape_string(*cu_seqlens_q));
    check_shape(*cu_seqlens_k, "cu_seqlens_k", {p.num_sequences + 1});
    p.cu_seqlens_q =
        copy_cumulative(p.cu_seqlens_q, "cu_seqlens_q", p.num_sequences, p.seqlen_q, query.size(2), copies);
    p.cu_seqlens_k =
        copy_cumulative(p.cu_seqlens_k, "cu_seqlens_k", p.num_sequences, p.seqlen_k, key.size(2), copies);
  }
  p.key_bias = device.array<float>(key_bias, "key_bias", ScalarType::Float, {p.num_sequences, p.seqlen_k});
  if (packed) {  // work and workspace follow what is there, whatever bound was given
    p.seqlen_q = longest_of(p.cu_seqlens_q, p.num_sequences);
    if (p.key_bias == nullptr) p.seqlen_k = longest_of(p.cu_seqlens_k, p.num_sequences);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const OptionalTensor& prompt_key, const OptionalTensor& prompt_value,
                                   const OptionalTensor& gate, const OptionalTensor& prompt_index,
                                   const OptionalTensor& key_bias, const OptionalTensor& cu_seqlens_q,
                                   const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q,
                                   int64_t max_seqlen_k, double scale, int64_t window_left,
                                   int64_t window_right, bool tanh_gate) {
  const Device device = Device::cpu();
  ForwardParams p{};
  Copies copies;
  set_tokens(p, device, query, key, value, key_bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
             copies);
  set_mask(p, scale, window_left, window_right, tanh_gate);
  set_prompt(p, device, Layout::kHeadMajor, prompt_key, prompt_value, gate, prompt_index);
  copy_prompt_index(p, copies);
  const int64_t batch = query.size(0), rows = query.size(2);
  Tensor out = device.empty_token_major(batch, p.num_heads_q, rows, p.head_dim, query.scalar_type());
  Tensor lse = device.empty_contiguous({batch, p.num_heads_q, rows}, ScalarType::Float);
  p.out = device.view(out, "out", Layout::kHeadMajor);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  run_stage(kernels().forward, p);
  return {out, lse};
}

// Splits are made at least this many, so that few heads still occupy many threads.
constexpr int64_t kSplits = 32;

void set_plan(BackwardPlan& p) {
  p.padded_dim = (p.head_dim + 15) / 16 * 16;
  p.block_queries = 256;
  const auto blocks = [&] { return (p.seqlen_q + p.block_queries - 1) / p.block_queries; };
  while (p.block_queries > 64 && p.num_sequences * p.num_heads_q * blocks() < kSplits) p.block_queries /= 2;
  p.blocks = blocks();
  const int64_t pairs = p.num_sequences * p.num_heads_kv;
  const int64_t passes = p.num_heads_q / p.num_heads_kv * p.blocks;
  p.splits = pairs == 0 ? 1 : std::max<int64_t>(1, std::min(passes, (kSplits + pairs - 1) / pairs));
  // Without partials in memory backward of 32/8 heads takes 6 to 10 % less (T = 512 and 2048, Zen 5).
  const int64_t threads = torch::stable::get_num_threads();
  p.in_turn = p.splits == 1 || pairs >= 4 * threads ||
              (p.cu_seqlens_q == nullptr && busy_share(pairs, threads) > 0.9);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out, const Tensor& lse,
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& prompt_key,
    const OptionalTensor& prompt_value, const OptionalTensor& gate, const OptionalTensor& prompt_index,
    const OptionalTensor& key_bias, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, int64_t window_left, int64_t window_right,
    bool tanh_gate, int64_t needs) {
  const Device device = Device::cpu();
  BackwardPlan p{};
  Copies copies;
  set_tokens(p, device, query, key, value, key_bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
             copies);
  set_mask(p, scale, window_left, window_right, tanh_gate);
  set_prompt(p, device, Layout::kHeadMajor, prompt_key, prompt_value, gate, prompt_index);
  copy_prompt_index(p, copies);
  const int64_t batch = query.size(0), rows = query.size(2), keys = key.size(2), D = p.head_dim;
  p.out = device.view(out, "out", Layout::kHeadMajor);
  p.grad_out = device.view(grad_out, "grad_out", Layout::kHeadMajor);
  check_shape(out, "out", {batch, p.num_heads_q, rows, D});
  check_shape(grad_out, "grad_out", {batch, p.num_heads_q, rows, D});
  ZINIT_CHECK(p.out.dtype == p.query.dtype && p.grad_out.dtype == p.query.dtype,
              "out and grad_out must have the dtype of query, ", query.scalar_type(), ", got ",
              out.scalar_type(), " and ", grad_out.scalar_type());
  p.lse = device.array<float>(lse, "lse", ScalarType::Float, {batch, p.num_heads_q, rows});
  p.grad_lse = device.array<float>(grad_lse, "grad_lse", ScalarType::Float, {batch, p.num_heads_q, rows});

  const auto wanted = [&](int bit) { return (needs >> bit & 1) != 0 && (bit < 3 || prompt_key.has_value()); };
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
      return device.empty_contiguous({p.prompt_rows, p.num_heads_kv, p.prompt_length, D},
                                     prompt->scalar_type());
    };
  };
  Tensor grad_query = gradient(0, p.grad_query, token_major(p.num_heads_q, rows));
  Tensor grad_key = gradient(1, p.grad_key, token_major(p.num_heads_kv, keys));
  Tensor grad_value = gradient(2, p.grad_value, token_major(p.num_heads_kv, keys));
  Tensor grad_prompt_key = gradient(3, p.grad_prompt_key, contiguous(prompt_key));
  Tensor grad_prompt_value = gradient(4, p.grad_prompt_value, contiguous(prompt_value));
  Tensor grad_gate = wanted(5) ? device.empty_contiguous({p.gate_rows, p.num_heads_q}, ScalarType::Float)
                               : device.empty_contiguous({0}, ScalarType::Float);
  if (wanted(5)) p.grad_gate = static_cast<float*>(grad_gate.mutable_data_ptr());

  set_plan(p);
  const int64_t splits = p.num_sequences * p.num_heads_kv * p.splits;
  const int64_t key_floats = !p.in_turn && p.wants_keys() ? splits * 2 * p.seqlen_k * p.padded_dim : 0;
  const int64_t prompt_floats = p.wants_prompt() ? splits * 2 * p.prompt_length * p.padded_dim : 0;
  const int64_t gate_floats = p.num_sequences * p.num_heads_q * p.blocks;
  Tensor workspace = device.empty_contiguous({key_floats + prompt_floats + gate_floats}, ScalarType::Float);
  float* floats = static_cast<float*>(workspace.mutable_data_ptr());
  p.key_partials = key_floats > 0 ? floats : nullptr;
  p.prompt_partials = floats + key_floats;
  p.gate_partials = floats + key_floats + prompt_floats;
  run_stage(kernels().backward, p);
  run_stage(kernels().backward_reduce, p);
  return {grad_query, grad_key, grad_value, grad_prompt_key, grad_prompt_value, grad_gate};
}

}  // namespace
}  // namespace zinit::cpu

// For tensors of every kind, so that what is no CPU tensor is refused by name, and not by the dispatcher.
STABLE_TORCH_LIBRARY_IMPL(zinit, CompositeExplicitAutograd, m) {
  m.impl("forward_cpu", TORCH_BOX(&zinit::cpu::forward));
  m.impl("backward_cpu", TORCH_BOX(&zinit::cpu::backward));
}
