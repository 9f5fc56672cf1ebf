#include "decode.h"
#include "launch.cuh"

namespace zinit::cuda {

void decode(const DecodeParams& params, const DecodePlan& plan, float* workspace, cudaStream_t stream) {
  if (params.num_sequences == 0) return;
  const DecodeWork w = decode_work(params, plan, workspace);
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
