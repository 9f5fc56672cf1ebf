// The launches of one dtype; each is compiled in a file of its own.
#pragma once
#include "combine.cuh"
#include "cuda_cores.cuh"
#include "tensor_cores.cuh"

namespace zinit::cuda {

inline DecodeWork decode_work(const DecodeParams& params, const DecodePlan& plan, float* workspace) {
  constexpr int64_t kFarther = int64_t{1} << 31;  // than any key, and the sums with it do not overflow
  DecodeWork w{};
  static_cast<DecodeParams&>(w) = params;
  w.window_left = std::min(w.window_left, kFarther);
  w.window_right = std::min(w.window_right, kFarther);
  w.group = static_cast<int>(w.num_heads_q / w.num_heads_kv);
  w.query_rows = static_cast<int>(w.seqlen_q) * w.group;
  w.row_blocks = plan.row_blocks;
  w.splits = plan.num_splits;
  w.by_page = Divider::by(w.block_table.given ? w.page_size : 1);
  w.partials = workspace;
  w.states = workspace + w.num_sequences * w.num_heads_kv * w.query_rows * w.splits * w.head_dim;
  return w;
}

inline SharedLayout attention_shared(const DecodeWork& w, const DecodePlan& plan) {
  const auto element_bytes = static_cast<int>(size_of(w.query.dtype));
  return {plan.rows_per_block, static_cast<int>(w.head_dim), element_bytes, static_cast<int>(w.prompt_length),
          static_cast<int>(w.seqlen_new)};
}

inline int combine_shared_bytes(const DecodeWork& w) {
  const auto element_bytes = static_cast<int>(size_of(w.query.dtype));
  const SharedLayout layout(1, static_cast<int>(w.head_dim), element_bytes, static_cast<int>(w.prompt_length),
                            0);
  return layout.bytes + w.splits * 4;
}

// False where the chip does not have the shared memory: then nothing was launched.
template <class T, int D>
bool launch_attention(const DecodeWork& w, const DecodePlan& plan, cudaStream_t stream) {
  constexpr int kSharedWithoutAsking = 48 << 10;
  const int shared_bytes = attention_shared(w, plan).bytes;
  const dim3 grid = grid_of(plan.num_splits, w.num_heads_kv * plan.row_blocks, w.num_sequences);
  const auto attend = [&](auto* kernel) {
    if (shared_bytes > kSharedWithoutAsking && !ALLOW_SHARED((kernel), shared_bytes)) return false;
    LAUNCH((kernel), grid, dim3(kThreads), shared_bytes, stream, w);
    return true;
  };
  if (plan.rows_per_block == 1) return attend(zinit_decode_cuda_cores<T, D, 1>);
  if constexpr (sizeof(T) == 2) {
    if (plan.tensor_cores) return attend(zinit_decode_tensor_cores<T, D>);
  }
  return attend(zinit_decode_cuda_cores<T, D, kCudaCoreRows>);
}

template <class T>
void launch_combine(const DecodeWork& w, cudaStream_t stream) {
  if (w.splits == 1 || w.query_rows == 0) return;
  const dim3 grid = grid_of(w.query_rows, w.num_heads_kv, w.num_sequences);
  LAUNCH_PROGRAMMATIC_DEPENDENT((zinit_decode_combine<T>), grid, dim3(kThreads), combine_shared_bytes(w),
                                stream, w);
}

template <class T>
void launch_decode(const DecodeWork& w, const DecodePlan& plan, cudaStream_t stream) {
  with_head_dim(w.head_dim, [&]<int D>() {
    if (launch_attention<T, D>(w, plan, stream)) launch_combine<T>(w, stream);
  });
}

extern template void launch_decode<bf16>(const DecodeWork&, const DecodePlan&, cudaStream_t);
extern template void launch_decode<fp16>(const DecodeWork&, const DecodePlan&, cudaStream_t);
extern template void launch_decode<float>(const DecodeWork&, const DecodePlan&, cudaStream_t);

}  // namespace zinit::cuda
