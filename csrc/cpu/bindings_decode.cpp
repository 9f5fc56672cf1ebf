// zinit::decode_cpu: what came is checked, the work is planned, three stages run. See call.py.
#include <tuple>

#include "arguments.h"
#include "plan.h"
#include "run_stage.h"

namespace zinit::cpu {
namespace {

std::tuple<Tensor, Tensor> decode(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                  const OptionalTensor& new_key, const OptionalTensor& new_value,
                                  const OptionalTensor& prompt_key, const OptionalTensor& prompt_value,
                                  const OptionalTensor& gate, const OptionalTensor& sinks,
                                  const OptionalTensor& prompt_index, const Tensor& cache_seqlens,
                                  const OptionalTensor& cache_leftpad, const OptionalTensor& block_table,
                                  const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
                                  bool rotary_interleaved, double scale, double softcap, int64_t window_left,
                                  int64_t window_right, bool tanh_gate, int64_t num_splits) {
  const Device device = Device::cpu();
  DecodeWork w{};
  Copies copies;
  const auto view = [&](const Tensor& tensor, const char* name) {
    return device.view(tensor, name, Layout::kTokenMajor);
  };
  w.query = view(query, "query");
  w.key_cache = view(key_cache, "key_cache");
  w.value_cache = view(value_cache, "value_cache");
  const int64_t B = query.size(0), T = query.size(1), Hq = query.size(2), D = query.size(3);
  const int64_t S = key_cache.size(1), Hkv = key_cache.size(2);
  ZINIT_CHECK(D >= 1 && D <= kMaxHeadDim, "head_dim must lie in 1 .. ", kMaxHeadDim, ", got ", D);
  ZINIT_CHECK(Hkv > 0 && Hq > 0 && Hq % Hkv == 0, "the ", Hq, " query heads must be a multiple of the ", Hkv,
              " key/value heads");
  check_shape(key_cache, "key_cache", {block_table.has_value() ? -1 : B, S, Hkv, D});
  check_shape(value_cache, "value_cache", {key_cache.size(0), S, Hkv, D});
  ZINIT_CHECK(w.key_cache.dtype == w.query.dtype && w.value_cache.dtype == w.query.dtype,
              "key_cache and value_cache must have the query's dtype ", query.scalar_type(), ", got ",
              key_cache.scalar_type(), " and ", value_cache.scalar_type());
  ZINIT_CHECK(num_splits >= 0, "num_splits must be 0 (choose) or positive, got ", num_splits);
  w.num_sequences = B, w.num_heads_q = Hq, w.num_heads_kv = Hkv, w.head_dim = D, w.seqlen_q = T;
  w.seqlen_k = S, w.num_splits = num_splits;

  ZINIT_CHECK(new_key.has_value() == new_value.has_value(), "new_key and new_value must be given together");
  if (new_key.has_value()) {
    w.new_key = view(*new_key, "new_key");
    w.new_value = view(*new_value, "new_value");
    w.seqlen_new = new_key->size(1);
    check_shape(*new_key, "new_key", {B, w.seqlen_new, Hkv, D});
    check_shape(*new_value, "new_value", {B, w.seqlen_new, Hkv, D});
    ZINIT_CHECK(w.new_key.dtype == w.query.dtype && w.new_value.dtype == w.query.dtype,
                "new_key and new_value must have the query's dtype ", query.scalar_type());
  }
  w.cache_seqlens = device.array<int32_t>(cache_seqlens, "cache_seqlens", ScalarType::Int, {B});
  w.cache_leftpad = device.array<int32_t>(cache_leftpad, "cache_leftpad", ScalarType::Int, {B});
  w.block_table = device.array<int32_t>(block_table, "block_table", ScalarType::Int, {B, -1});
  if (block_table.has_value()) {
    w.block_table_stride = block_table->size(1);
    w.page_size = S, w.num_pages = key_cache.size(0), w.seqlen_k = w.block_table_stride * S;
  }
  set_mask(w, scale, softcap, window_left, window_right, tanh_gate);
  set_prompt(w, device, Layout::kTokenMajor, prompt_key, prompt_value, gate, prompt_index);
  check_apart(w, key_cache, value_cache, query, new_key, new_value, prompt_key, prompt_value);
  copy_prompt_index(w, copies);
  set_sinks(w, device, sinks);
  set_rotary(w, device, rotary_cos, rotary_sin, rotary_interleaved, window_left >= 0 || window_right >= 0);
  plan_decode(w, copy_lengths(w, copies), torch::stable::get_num_threads());

  Tensor out = device.empty_contiguous({B, T, Hq, D}, query.scalar_type());
  Tensor lse = device.empty_contiguous({B, Hq, T}, ScalarType::Float);
  w.out = view(out, "out");
  w.lse = static_cast<float*>(lse.data_ptr());
  OptionalTensor partials;
  if (w.splits > 1) {
    partials = device.empty_contiguous({decode_partial_floats(w)}, ScalarType::Float);
    w.partials = static_cast<float*>(partials->data_ptr());
  }
  run_stage(kernels().decode_append, w);
  run_stage(kernels().decode_attend, w);
  run_stage(kernels().decode_combine, w);
  return {out, lse};
}

}  // namespace
}  // namespace zinit::cpu

STABLE_TORCH_LIBRARY_IMPL(zinit, CompositeExplicitAutograd, m) {
  m.impl("decode_cpu", TORCH_BOX(&zinit::cpu::decode));
}
