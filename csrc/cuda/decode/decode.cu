#include "decode.h"
#include "launch.cuh"

namespace zinit::cuda {

void decode(const DecodeParams& params, const DecodePlan& plan, float* workspace, cudaStream_t stream) {
  if (params.num_sequences == 0) return;
  const DecodeWork w = decode_work(params, plan, workspace);
  with_dtype(w.query.dtype, [&]<class T>() { launch_decode<T>(w, plan, stream); });
}

}  // namespace zinit::cuda
