// The prompt branch alone, added to an output that somebody else's kernel computed: one pass over both.
#pragma once
#include "../tiles/prompts.cuh"

namespace zinit::cuda {

template <int D>
using PromptShape = TileShape<D, 1, 16>;

struct PromptWork : PromptParams {
  int group;  // Hq / Hkv
  bool prompt_vectors;
};

template <class T, class Shape>
struct PromptShared {
  static constexpr int kBytes =
      (2 * Shape::kQueryElements + 2 * Shape::kKeyElements) * static_cast<int>(sizeof(T));
  T *queries, *out, *keys, *values;

  __device__ explicit PromptShared(unsigned char* memory)
      : queries(reinterpret_cast<T*>(memory)),
        out(queries + Shape::kQueryElements),
        keys(out + Shape::kQueryElements),
        values(keys + Shape::kKeyElements) {}
};

// All that a block reads is on its way at once: queries, output, prompts.
template <class T, int D>
__global__ void __launch_bounds__(kThreads) zinit_add_prompts(const PromptWork w) {
  using Shape = PromptShape<D>;
  DYNAMIC_SHARED(memory);
  const PromptShared<T, Shape> shared(memory);
  const auto sequence = static_cast<int>(blockIdx.z), head = static_cast<int>(blockIdx.y);
  const PromptBranch branch(w, sequence, head, head / w.group, w.prompt_vectors);
  if (!branch.is_wanted()) return;

  int batch = sequence, first = 0, count = static_cast<int>(w.seqlen_q);
  if (w.cu_seqlens_q.given) {
    const PackedRows rows(w.cu_seqlens_q.data, sequence, w.total_q);
    batch = 0, first = rows.first, count = rows.count;
  }
  const int skipped = static_cast<int>(blockIdx.x) * Shape::kQueries;
  first += skipped, count = min(count - skipped, Shape::kQueries);
  if (count <= 0) return;

  each_vector<Shape>(Shape::kQueries, [&](int row, int d) {
    const bool wanted = row < count;
    const int token = first + (wanted ? row : 0), to = row * Shape::kStride + d;
    copy_async(shared.queries + to, row_of<T>(w.query, batch, head, token) + d, wanted);
    copy_async(shared.out + to, row_of<T>(w.out, batch, head, token) + d, wanted);
  });
  stage_prompts<T, Shape>(w, branch, 0, shared.keys, shared.values);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  typename Shape::Output out = {};
  add_prompts<T, Shape>(w, branch, shared.queries, shared.keys, shared.values, out);
  write_rows<true, T, Shape>(out, shared.out, count,
                             [&](int row) { return row_of<T>(w.out, batch, head, first + row); });
}

}  // namespace zinit::cuda
