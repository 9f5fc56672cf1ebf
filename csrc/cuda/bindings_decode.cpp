// zinit::decode_cuda: the arguments are checked, the call is planned, the kernels are launched on torch's
// current stream. Nothing waits for the device, so a CUDA graph can capture it.
#include <algorithm>
#include <tuple>

#include "bindings.h"
#include "decode/decode.h"
#include "prefill/prefill.h"

namespace zinit::cuda {
namespace {

void set_cache(DecodeParams& w, const Device& device, const Tensor& key_cache, const Tensor& value_cache,
               const Tensor& cache_seqlens, const OptionalTensor& cache_leftpad,
               const OptionalTensor& block_table) {
  const int64_t S = key_cache.size(1);
  check_shape(key_cache, "key_cache",
              {block_table.has_value() ? -1 : w.num_sequences, S, w.num_heads_kv, w.head_dim});
  check_shape(value_cache, "value_cache", {key_cache.size(0), S, w.num_heads_kv, w.head_dim});
  ZINIT_CHECK(w.key_cache.dtype == w.query.dtype && w.value_cache.dtype == w.query.dtype,
              "key_cache and value_cache must have the query's dtype, got ", key_cache.scalar_type(), " and ",
              value_cache.scalar_type());
  w.cache_seqlens = device.array<int32_t>(cache_seqlens, "cache_seqlens", ScalarType::Int, {w.num_sequences});
  w.cache_leftpad = device.array<int32_t>(cache_leftpad, "cache_leftpad", ScalarType::Int, {w.num_sequences});
  w.seqlen_k = S;
  w.block_table = device.array<int32_t>(block_table, "block_table", ScalarType::Int, {w.num_sequences, -1});
  if (block_table.has_value()) {
    w.block_table_stride = block_table->size(1);
    w.page_size = S, w.num_pages = key_cache.size(0), w.seqlen_k = S * w.block_table_stride;
    ZINIT_CHECK(S > 0 && w.num_pages > 0, "key_cache must have a page of at least one key");
  }
  ZINIT_CHECK(w.seqlen_k < kMaxRows && w.num_pages < kMaxRows, "the cache must have fewer than ", kMaxRows,
              " positions a sequence and as many pages");
}

void set_new_tokens(DecodeParams& w, const Device& device, const OptionalTensor& key,
                    const OptionalTensor& value) {
  ZINIT_CHECK(key.has_value() == value.has_value(), "new_key and new_value must be given together");
  if (!key.has_value()) return;
  w.new_key = device.view(*key, "new_key", Layout::kTokenMajor);
  w.new_value = device.view(*value, "new_value", Layout::kTokenMajor);
  w.seqlen_new = key->size(1);
  check_shape(*key, "new_key", {w.num_sequences, w.seqlen_new, w.num_heads_kv, w.head_dim});
  check_shape(*value, "new_value", {w.num_sequences, w.seqlen_new, w.num_heads_kv, w.head_dim});
  ZINIT_CHECK(w.new_key.dtype == w.query.dtype && w.new_value.dtype == w.query.dtype,
              "new_key and new_value must have the query's dtype");
}

std::tuple<Tensor, Tensor> decode_cuda(Tensor query, Tensor key_cache, Tensor value_cache,
                                       OptionalTensor new_key, OptionalTensor new_value,
                                       OptionalTensor prompt_key, OptionalTensor prompt_value,
                                       OptionalTensor gate, OptionalTensor sinks, OptionalTensor prompt_index,
                                       Tensor cache_seqlens, OptionalTensor cache_leftpad,
                                       OptionalTensor block_table, OptionalTensor rotary_cos,
                                       OptionalTensor rotary_sin, bool rotary_interleaved, double scale,
                                       double softcap, int64_t window_left, int64_t window_right,
                                       bool tanh_gate, int64_t num_splits) {
  const Device device = Device::cuda(query);
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  DecodeParams w{};
  w.query = device.view(query, "query", Layout::kTokenMajor);
  w.key_cache = device.aligned_view(key_cache, "key_cache", Layout::kTokenMajor);
  w.value_cache = device.aligned_view(value_cache, "value_cache", Layout::kTokenMajor);
  const int64_t B = query.size(0), T = query.size(1), Hq = query.size(2), D = query.size(3);
  w.num_sequences = B, w.num_heads_q = Hq, w.num_heads_kv = key_cache.size(2), w.head_dim = D, w.seqlen_q = T;
  w.scale = static_cast<float>(scale), w.softcap = static_cast<float>(softcap);
  w.tanh_gate = tanh_gate, w.num_splits = num_splits;
  w.window_left = window_left, w.window_right = window_right;
  set_cache(w, device, key_cache, value_cache, cache_seqlens, cache_leftpad, block_table);
  set_new_tokens(w, device, new_key, new_value);
  set_prompt(w, device, Layout::kTokenMajor, prompt_key, prompt_value, gate, prompt_index);
  check_apart(w, key_cache, value_cache, query, new_key, new_value, prompt_key, prompt_value);
  set_sinks(w, device, sinks);
  set_rotary(w, device, rotary_cos, rotary_sin, rotary_interleaved, window_left >= 0 || window_right >= 0);
  ZINIT_CHECK(!w.rotary.given || w.rotary.positions > 0, "rotary_cos must have a position");
  ZINIT_CHECK(num_splits >= 0, "num_splits must be 0 (choose) or positive, got ", num_splits);
  check_limits(w);

  Tensor out = device.empty_contiguous({B, T, Hq, D}, query.scalar_type());
  Tensor lse = device.empty_contiguous({B, Hq, T}, ScalarType::Float);
  w.out = device.view(out, "out", Layout::kTokenMajor);
  w.lse = static_cast<float*>(lse.data_ptr());
  if (std::max(w.seqlen_q, w.seqlen_new) > kMaxNewTokens) {
    device.aligned_view(query, "query", Layout::kTokenMajor);
    check_half_precision(w.query);
    prefill(prefill_params(w), current_stream(device.index()));
    check_launch("decode_cuda");
    return {out, lse};
  }

  ZINIT_CHECK(Hq * T <= 65535, "at most 65535 query heads times tokens");
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device.index()),
             "cudaDeviceGetAttribute");
  const DecodePlan plan = plan_decode(multiprocessors, B, w.num_heads_kv, T * (Hq / w.num_heads_kv),
                                      w.seqlen_k, w.page_size, w.query.dtype != DType::kFloat32, num_splits);
  Tensor workspace = device.empty_contiguous({workspace_floats(plan, B, Hq, T, D)}, ScalarType::Float);
  decode(w, plan, static_cast<float*>(workspace.data_ptr()), current_stream(device.index()));
  check_launch("decode_cuda");
  return {out, lse};
}

}  // namespace
}  // namespace zinit::cuda

STABLE_TORCH_LIBRARY_IMPL(zinit, CompositeExplicitAutograd, m) {
  m.impl("decode_cuda", TORCH_BOX(&zinit::cuda::decode_cuda));
}
