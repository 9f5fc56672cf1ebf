// zinit::forward_cuda and zinit::prompt_cuda, as bindings_decode.cpp: nothing waits for the device.
#include <algorithm>
#include <tuple>

#include "bindings.h"
#include "prefill/prefill.h"
#include "prompt/prompt.h"

namespace zinit::cuda {
namespace {

// [B + 1] lengths for packed tensors [1, H, total, D]; the sequences are counted here.
void set_packing(AttentionParams& w, const Device& device, const OptionalTensor& cu_seqlens_q,
                 const char* name_q, const OptionalTensor& cu_seqlens_k, const char* name_k) {
  ZINIT_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), name_q, " and ", name_k,
              " must be given together");
  if (!cu_seqlens_q.has_value()) return;
  w.cu_seqlens_q = device.array<int32_t>(*cu_seqlens_q, name_q, ScalarType::Int, {-1});
  const int64_t count = cu_seqlens_q->size(0);
  ZINIT_CHECK(count > 0, name_q, " must hold B + 1 cumulative lengths, got shape ",
              shape_string(*cu_seqlens_q));
  w.cu_seqlens_k = device.array<int32_t>(*cu_seqlens_k, name_k, ScalarType::Int, {count});
  ZINIT_CHECK(w.num_sequences == 1, "packed tensors must have a batch of 1, got ", w.num_sequences);
  w.num_sequences = count - 1;
}

std::tuple<Tensor, Tensor> forward_cuda(Tensor query, Tensor key, Tensor value, OptionalTensor prompt_key,
                                        OptionalTensor prompt_value, OptionalTensor gate,
                                        OptionalTensor sinks, OptionalTensor prompt_index,
                                        OptionalTensor key_bias, OptionalTensor cu_seqlens_q,
                                        OptionalTensor cu_seqlens_k, int64_t max_seqlen_q,
                                        int64_t max_seqlen_k, double scale, double softcap,
                                        int64_t window_left, int64_t window_right, bool tanh_gate) {
  const Device device = Device::cuda(query);
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  PrefillParams w{};
  w.query = device.aligned_view(query, "query", Layout::kHeadMajor);
  w.key_cache = device.aligned_view(key, "key", Layout::kHeadMajor);
  w.value_cache = device.aligned_view(value, "value", Layout::kHeadMajor);
  const int64_t B = query.size(0), Hq = query.size(1), T = query.size(2), D = query.size(3), S = key.size(2);
  w.num_sequences = B, w.num_heads_q = Hq, w.num_heads_kv = key.size(1), w.head_dim = D;
  w.seqlen_q = w.total_q = T, w.seqlen_k = w.total_k = S;
  w.scale = static_cast<float>(scale), w.softcap = static_cast<float>(softcap);
  w.tanh_gate = tanh_gate;
  w.window_left = window_left, w.window_right = window_right;
  check_shape(key, "key", {B, w.num_heads_kv, S, D});
  check_shape(value, "value", {B, w.num_heads_kv, S, D});
  ZINIT_CHECK(w.key_cache.dtype == w.query.dtype && w.value_cache.dtype == w.query.dtype,
              "key and value must have the query's dtype");
  ZINIT_CHECK(T < kMaxRows && S < kMaxRows, "query and key must have fewer than ", kMaxRows, " rows");
  w.key_bias = device.array<float>(key_bias, "key_bias", ScalarType::Float, {B, S});
  ZINIT_CHECK(!cu_seqlens_q.has_value() || !key_bias.has_value(), "key_bias does not go with packed tensors");
  set_packing(w, device, cu_seqlens_q, "cu_seqlens_q", cu_seqlens_k, "cu_seqlens_k");
  if (cu_seqlens_q.has_value()) {
    w.seqlen_q = std::clamp<int64_t>(max_seqlen_q, 0, T),
    w.seqlen_k = std::clamp<int64_t>(max_seqlen_k, 0, S);
  }
  set_prompt(w, device, Layout::kHeadMajor, prompt_key, prompt_value, gate, prompt_index);
  set_sinks(w, device, sinks);
  check_limits(w);
  check_half_precision(w.query);

  Tensor out = device.empty_token_major(B, Hq, T, D, query.scalar_type());
  Tensor lse = device.empty_contiguous({B, Hq, T}, ScalarType::Float);
  w.out = device.view(out, "out", Layout::kHeadMajor);
  w.lse = static_cast<float*>(lse.data_ptr());
  prefill(w, current_stream(device.index()));
  check_launch("forward_cuda");
  return {out, lse};
}

void prompt_cuda(Tensor out, Tensor query, Tensor prompt_key, Tensor prompt_value, Tensor gate,
                 OptionalTensor prompt_index, OptionalTensor cu_seqlens, int64_t max_seqlen, double scale,
                 double softcap, bool tanh_gate) {
  const Device device = Device::cuda(query);
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  PromptParams w{};
  w.query = device.aligned_view(query, "query", Layout::kHeadMajor);
  w.out = device.aligned_view(out, "out", Layout::kHeadMajor);
  const int64_t B = query.size(0), Hq = query.size(1), T = query.size(2), D = query.size(3);
  check_shape(out, "out", {B, Hq, T, D});
  ZINIT_CHECK(w.out.dtype == w.query.dtype, "out must have the query's dtype");
  device.view(prompt_key, "prompt_key", Layout::kHeadMajor);
  w.num_sequences = B, w.num_heads_q = Hq, w.num_heads_kv = prompt_key.size(1), w.head_dim = D;
  w.seqlen_q = w.total_q = T, w.scale = static_cast<float>(scale), w.softcap = static_cast<float>(softcap);
  w.tanh_gate = tanh_gate;
  ZINIT_CHECK(T < kMaxRows, "query must have fewer than ", kMaxRows, " rows");
  set_packing(w, device, cu_seqlens, "cu_seqlens", cu_seqlens, "cu_seqlens");
  if (cu_seqlens.has_value()) w.seqlen_q = std::clamp<int64_t>(max_seqlen, 0, T);
  set_prompt(w, device, Layout::kHeadMajor, prompt_key, prompt_value, gate, prompt_index);
  check_limits(w);
  check_half_precision(w.query);
  add_prompt_branch(w, current_stream(device.index()));
  check_launch("prompt_cuda");
}

}  // namespace
}  // namespace zinit::cuda

// For tensors of every kind, so that what is no CUDA tensor is refused by name, and not by the dispatcher.
STABLE_TORCH_LIBRARY_IMPL(zinit, CompositeExplicitAutograd, m) {
  m.impl("forward_cuda", TORCH_BOX(&zinit::cuda::forward_cuda));
  m.impl("prompt_cuda", TORCH_BOX(&zinit::cuda::prompt_cuda));
}
