#include "decode.h"
#include "launch.cuh"

namespace zinit::cuda {

void decode(const DecodeParams& params, const DecodePlan& plan, float* workspace, cudaStream_t stream) {
  if (params.num_sequences == 0) return;
  DecodeWork w{};
  static_cast<DecodeParams&>(w) = params;
  w.group = static_cast<int>(w.num_heads_q / w.num_heads_kv);
  w.query_rows = static_cast<int>(w.seqlen_q) * w.group;
  w.row_blocks = plan.row_blocks;
  w.splits = plan.num_splits;
  w.by_page = Divider::by(w.block_table ? w.page_size : 1);
  w.partials = workspace;
  w.states = workspace + w.num_sequences * w.num_heads_kv * w.query_rows * w.splits * w.head_dim;
  switch (w.query.dtype) {
    case DType::kFloat32:
      return launch_decode<float>(w, plan, stream);
    case DType::kBFloat16:
      return launch_decode<bf16>(w, plan, stream);
    case DType::kFloat16:
      return launch_decode<fp16>(w, plan, stream);
  }
}

}  // namespace zinit::cuda
