#include "launch.cuh"
#include "prefill.h"

namespace zinit::cuda {

void prefill(const PrefillParams& params, cudaStream_t stream) {
  if (params.num_sequences == 0) return;
  const PrefillWork w = prefill_work(params);
  if (w.query.dtype == DType::kBFloat16) {
    launch_prefill<bf16>(w, stream);
  } else {
    launch_prefill<fp16>(w, stream);
  }
}

}  // namespace zinit::cuda
