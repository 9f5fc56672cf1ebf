// The launches of one dtype; each is compiled in a file of its own.
#pragma once
#include "append.cuh"
#include "kernel.cuh"

namespace zinit::cuda {

inline PrefillWork prefill_work(const PrefillParams& params) {
  const auto reach = [](int64_t window) {
    return static_cast<int>(window < 0 ? kUnlimited : std::min<int64_t>(window, kUnlimited));
  };
  PrefillWork w{};
  static_cast<DecodeParams&>(w) = params;
  w.total_q = params.total_q, w.total_k = params.total_k;
  w.by_page = Divider::by(w.block_table.given ? w.page_size : 1);
  w.group = static_cast<int>(w.num_heads_q / w.num_heads_kv);
  w.reach_left = reach(w.window_left), w.reach_right = reach(w.window_right);
  w.prompt_vectors = prompts_in_vectors(w, w.query.dtype);
  return w;
}

template <class T>
void launch_append(const PrefillWork& w, cudaStream_t stream) {
  const int64_t blocks = (w.seqlen_new + kTokensPerBlock - 1) / kTokensPerBlock;
  if (blocks == 0) return;
  const dim3 grid = grid_of(blocks, w.num_heads_kv, w.num_sequences);
  LAUNCH((zinit_append<T>), grid, dim3(kThreads), 0, stream, w);
}

template <class T, int D>
void launch_prefill_of(const PrefillWork& w, cudaStream_t stream) {
  using Shape = PrefillShape<D>;
  constexpr int kSharedBytes = PrefillShared<T, Shape>::kBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes);
  if (!ALLOW_SHARED((zinit_prefill<T, D>), kSharedBytes)) return;  // the cache stays as it was
  launch_append<T>(w, stream);
  const int64_t blocks = (w.seqlen_q + Shape::kQueries - 1) / Shape::kQueries;
  if (blocks == 0) return;
  const dim3 grid = grid_of(blocks, w.num_heads_q, w.num_sequences);
  LAUNCH((zinit_prefill<T, D>), grid, dim3(kThreads), kSharedBytes, stream, w);
}

template <class T>
void launch_prefill(const PrefillWork& w, cudaStream_t stream) {
  with_head_dim(w.head_dim, [&]<int D>() { launch_prefill_of<T, D>(w, stream); });
}

extern template void launch_prefill<bf16>(const PrefillWork&, cudaStream_t);
extern template void launch_prefill<fp16>(const PrefillWork&, cudaStream_t);

}  // namespace zinit::cuda
