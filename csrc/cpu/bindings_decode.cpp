// zinit::decode_cpu: what came is checked, the work is planned, three stages run. See schemas.py.
#include "arguments.h"
#include "decode_work.h"
#include "run_stage.h"

namespace zinit::cpu {
namespace {

void check_rotary(DecodeParams& p, const OptionalTensor& cos, const OptionalTensor& sin) {
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(),
                  "rotary_cos and rotary_sin must be given together, or neither");
  if (!cos.has_value()) return;
  check_shape(*cos, "rotary_cos", {-1, -1});
  check_shape(*sin, "rotary_sin", {cos->size(0), cos->size(1)});
  STD_TORCH_CHECK(cos->is_cpu() && sin->is_cpu(), "rotary_cos and rotary_sin must be CPU tensors");
  STD_TORCH_CHECK(cos->is_contiguous() && sin->is_contiguous(),
                  "rotary_cos and rotary_sin must be contiguous");
  STD_TORCH_CHECK(2 * cos->size(1) <= p.head_dim, "rotary_cos must have at most ", p.head_dim / 2,
                  " columns, got ", cos->size(1));
  p.rotary_dtype = dtype_of(*cos, "rotary_cos");
  STD_TORCH_CHECK(dtype_of(*sin, "rotary_sin") == p.rotary_dtype,
                  "rotary_cos and rotary_sin must have one dtype");
  p.rotary_cos = cos->const_data_ptr();
  p.rotary_sin = sin->const_data_ptr();
  p.rotary_stride = cos->size(1);
  p.rotary_dim = 2 * cos->size(1);
}

// Lengths, pages and positions, by value: nothing has been written yet. Returns the longest sequence after
// the append.
int64_t check_lengths(const DecodeParams& p, int64_t max_pages, int64_t rotary_positions) {
  int64_t longest = 0;
  const int64_t appended = p.new_key.data ? p.seqlen_new : 0;
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const int64_t length = p.cache_seqlens[b], total = length + appended;
    STD_TORCH_CHECK(length >= 0 && total <= p.seqlen_k, "cache_seqlens[", b, "] = ", length, " plus ",
                    appended, " new tokens must lie in 0 .. ", p.seqlen_k,
                    ", the capacity of the cache: make the cache longer (or give the sequence more pages)");
    const int64_t positions = length + std::max(appended, p.seqlen_q);
    STD_TORCH_CHECK(p.rotary_cos == nullptr || positions <= rotary_positions, "rotary_cos has ",
                    rotary_positions, " positions, sequence ", b, " needs ", positions);
    for (int64_t i = 0; i < max_pages && i * p.page_size < total; ++i) {
      const int32_t page = p.block_table[b * p.block_table_stride + i];
      STD_TORCH_CHECK(page >= 0 && page < p.num_pages, "block_table[", b, ", ", i, "] must lie in 0 .. ",
                      p.num_pages - 1, ", the pages there are, got ", page);
    }
    longest = std::max(longest, total);
  }
  return longest;
}

// Items for every thread to take, of nearly equal number; keys are split only where sequences and heads do
// not suffice.
void plan(DecodeWork& w, int64_t longest) {
  constexpr int64_t kRunBytes = 4096;  // of a token-major cache read in one piece
  constexpr int64_t kStateBytes =
      1 << 18;  // queries and accumulators of an item, half of a level 2 cache at most
  constexpr int64_t kKeysWorthASplit = 256;
  const int64_t group = w.num_heads_q / w.num_heads_kv;
  w.query_block = std::clamp<int64_t>(kDecodeRows / group, 1, std::max<int64_t>(w.seqlen_q, 1));
  w.query_blocks = (w.seqlen_q + w.query_block - 1) / w.query_block;
  w.heads_per_item = 1;
  if (w.key_cache.head < w.key_cache.token) {
    const int64_t row_bytes = w.head_dim * (w.query.dtype == DType::kFloat32 ? 4 : 2);
    const int64_t head_state = group * w.query_block * partial_size(w.head_dim) * 8;
    w.heads_per_item = std::min((kRunBytes + row_bytes - 1) / row_bytes, kStateBytes / head_state);
    w.heads_per_item = std::clamp<int64_t>(w.heads_per_item, 1, w.num_heads_kv);
  }
  w.head_blocks = (w.num_heads_kv + w.heads_per_item - 1) / w.heads_per_item;

  const int64_t most = std::max<int64_t>(longest / kKeysWorthASplit, 1),
                threads = torch::stable::get_num_threads();
  const int64_t blocks = w.num_sequences * w.query_blocks * w.head_blocks;
  w.splits = std::clamp<int64_t>(w.num_splits, 1, std::max<int64_t>(longest, 1));
  if (w.num_splits == 0) {
    while (w.splits < most && busy_share(blocks * w.splits, threads) < 0.9) ++w.splits;
  }
}

std::tuple<Tensor, Tensor> decode(Tensor query, Tensor key_cache, Tensor value_cache, OptionalTensor new_key,
                                  OptionalTensor new_value, OptionalTensor prompt_key,
                                  OptionalTensor prompt_value, OptionalTensor gate,
                                  OptionalTensor prompt_index, Tensor cache_seqlens,
                                  OptionalTensor block_table, OptionalTensor rotary_cos,
                                  OptionalTensor rotary_sin, bool rotary_interleaved, double scale,
                                  int64_t window_left, int64_t window_right, bool tanh_gate,
                                  int64_t num_splits) {
  DecodeWork w{};
  const auto view = [](const Tensor& tensor, const char* name) {
    return view_of(tensor, name, Layout::kTokenMajor);
  };
  w.query = view(query, "query");
  w.key_cache = view(key_cache, "key_cache");
  w.value_cache = view(value_cache, "value_cache");
  const int64_t B = query.size(0), T = query.size(1), Hq = query.size(2), D = query.size(3);
  const int64_t S = key_cache.size(1), Hkv = key_cache.size(2);
  STD_TORCH_CHECK(D >= 1 && D <= kMaxHeadDim, "head_dim must lie in 1 .. ", kMaxHeadDim, ", got ", D);
  STD_TORCH_CHECK(Hkv > 0 && Hq > 0 && Hq % Hkv == 0, "the ", Hq, " query heads must be a multiple of the ",
                  Hkv, " key/value heads");
  check_shape(key_cache, "key_cache", {block_table.has_value() ? -1 : B, S, Hkv, D});
  check_shape(value_cache, "value_cache", {key_cache.size(0), S, Hkv, D});
  STD_TORCH_CHECK(w.key_cache.dtype == w.query.dtype && w.value_cache.dtype == w.query.dtype,
                  "key_cache and value_cache must have the query's dtype ", query.scalar_type(), ", got ",
                  key_cache.scalar_type(), " and ", value_cache.scalar_type());
  STD_TORCH_CHECK(num_splits >= 0, "num_splits must be 0 (choose) or positive, got ", num_splits);
  w.num_sequences = B, w.num_heads_q = Hq, w.num_heads_kv = Hkv, w.head_dim = D, w.seqlen_q = T,
  w.seqlen_k = S;
  w.num_splits = num_splits, w.rotary_interleaved = rotary_interleaved;

  STD_TORCH_CHECK(new_key.has_value() == new_value.has_value(),
                  "new_key and new_value must be given together");
  if (new_key.has_value()) {
    w.new_key = view(*new_key, "new_key");
    w.new_value = view(*new_value, "new_value");
    w.seqlen_new = new_key->size(1);
    check_shape(*new_key, "new_key", {B, w.seqlen_new, Hkv, D});
    check_shape(*new_value, "new_value", {B, w.seqlen_new, Hkv, D});
    STD_TORCH_CHECK(w.new_key.dtype == w.query.dtype && w.new_value.dtype == w.query.dtype,
                    "new_key and new_value must have the query's dtype ", query.scalar_type());
    if (w.seqlen_new == 0) w.new_key = w.new_value = View{};
  }
  w.cache_seqlens = array_of<int32_t>(cache_seqlens, "cache_seqlens", ScalarType::Int, {B});
  int64_t max_pages = 0;
  if (block_table.has_value()) {
    check_shape(*block_table, "block_table", {B, -1});
    max_pages = w.block_table_stride = block_table->size(1);
    w.block_table = array_of<int32_t>(block_table, "block_table", ScalarType::Int, {B, max_pages});
    w.page_size = S, w.num_pages = key_cache.size(0), w.seqlen_k = max_pages * S;
  }
  set_mask(w, scale, window_left, window_right, tanh_gate);
  w.rotate_by_token = window_left >= 0 || window_right >= 0;
  set_prompt(w, prompt_key, prompt_value, gate, prompt_index, Layout::kTokenMajor);
  check_rotary(w, rotary_cos, rotary_sin);
  plan(w, check_lengths(w, max_pages, rotary_cos.has_value() ? rotary_cos->size(0) : 0));

  Tensor out = empty_contiguous({B, T, Hq, D}, query.scalar_type());
  Tensor lse = empty_contiguous({B, Hq, T}, ScalarType::Float);
  w.out = view(out, "out");
  w.lse = static_cast<float*>(lse.data_ptr());
  OptionalTensor partials;
  if (w.splits > 1) {
    partials = empty_contiguous({B * Hq * T * w.splits * partial_size(D)}, ScalarType::Float);
    w.partials = static_cast<float*>(partials->data_ptr());
  }
  run_stage(kernels().decode_append, w);
  run_stage(kernels().decode_attend, w);
  run_stage(kernels().decode_combine, w);
  return {out, lse};
}

}  // namespace
}  // namespace zinit::cpu

STABLE_TORCH_LIBRARY_IMPL(zinit, CPU, m) { m.impl("decode_cpu", TORCH_BOX(&zinit::cpu::decode)); }
