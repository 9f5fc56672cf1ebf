// The launches of one dtype; each is compiled in a file of its own.
#pragma once
#include "combine.cuh"
#include "cuda_cores.cuh"
#include "tensor_cores.cuh"

namespace zinit::cuda {

// kernel<<<...>>> by the plan; head_dim and the way of computing are template arguments, all else is not.
template <class T>
void launch_decode(const DecodeWork& w, const DecodePlan& plan, cudaStream_t stream) {
  constexpr int kSharedWithoutAsking = 48 << 10;
  const auto prompts = static_cast<int>(w.prompt_length), head_dim = static_cast<int>(w.head_dim);
  const SharedLayout shared(plan.rows_per_block, head_dim, sizeof(T), prompts,
                            static_cast<int>(w.seqlen_new));
  const dim3 grid(plan.num_splits, static_cast<unsigned>(w.num_heads_kv * plan.row_blocks),
                  static_cast<unsigned>(w.num_sequences));
  const auto run = [&](auto dimension) {
    constexpr int D = decltype(dimension)::value;
    const auto attend = [&](auto* kernel) {
      if (shared.bytes > kSharedWithoutAsking) ALLOW_SHARED((kernel), shared.bytes);
      LAUNCH((kernel), grid, dim3(kThreads), shared.bytes, stream, w);
    };
    if (plan.rows_per_block == 1) return attend(decode_on_cuda_cores<T, D, 1>);
    if constexpr (sizeof(T) == 2) {
      if (plan.tensor_cores) return attend(decode_on_tensor_cores<T, D>);
    }
    attend(decode_on_cuda_cores<T, D, kCudaCoreRows>);
  };
  switch (head_dim) {
    case 64:
      run(std::integral_constant<int, 64>());
      break;
    case 80:
      run(std::integral_constant<int, 80>());
      break;
    case 96:
      run(std::integral_constant<int, 96>());
      break;
    case 128:
      run(std::integral_constant<int, 128>());
      break;
    default:
      run(std::integral_constant<int, 256>());
  }
  if (plan.num_splits == 1 || w.query_rows == 0) return;
  const SharedLayout combined(1, head_dim, sizeof(T), prompts, 0);
  const dim3 rows(static_cast<unsigned>(w.query_rows), static_cast<unsigned>(w.num_heads_kv),
                  static_cast<unsigned>(w.num_sequences));
  LAUNCH((decode_combine<T>), rows, dim3(kThreads), combined.bytes + plan.num_splits * 4, stream, w);
}

extern template void launch_decode<bf16>(const DecodeWork&, const DecodePlan&, cudaStream_t);
extern template void launch_decode<fp16>(const DecodeWork&, const DecodePlan&, cudaStream_t);
extern template void launch_decode<float>(const DecodeWork&, const DecodePlan&, cudaStream_t);

}  // namespace zinit::cuda
