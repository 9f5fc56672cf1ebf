#include "launch.cuh"
#include "prefill.h"

namespace zinit::cuda {

void prefill(const PrefillParams& params, cudaStream_t stream) {
  if (params.num_sequences == 0) return;
  const PrefillWork w = prefill_work(params);
  with_half_dtype(w.query.dtype, [&]<class T>() { launch_prefill<T>(w, stream); });
}

}  // namespace zinit::cuda
