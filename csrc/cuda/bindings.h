// What the bindings of this folder share: the limits of the kernels, and torch's current stream.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "../arguments.h"
#include "block.h"

// It lies in libtorch_cuda; weak, so that this file loads into a torch without CUDA too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace zinit::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  ZINIT_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(int32_t device) {
  ZINIT_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* operation) {
  const cudaError_t error = cudaGetLastError();
  ZINIT_CHECK(error == cudaSuccess, operation, " was not launched: ", cudaGetErrorString(error));
}

// What all kernels were compiled for.
inline void check_limits(const AttentionParams& w) {
  const int64_t D = w.head_dim;
  ZINIT_CHECK(D == 64 || D == 80 || D == 96 || D == 128 || D == 256,
              "head_dim must be 64, 80, 96, 128 or 256, got ", D);
  ZINIT_CHECK(w.num_heads_kv > 0 && w.num_heads_q > 0 && w.num_heads_q % w.num_heads_kv == 0, "the ",
              w.num_heads_q, " query heads must be a multiple of the ", w.num_heads_kv, " key/value heads");
  ZINIT_CHECK(w.num_sequences <= 65535 && w.num_heads_q <= 65535, "at most 65535 sequences and heads");
}

// What the tensor cores take.
inline void check_half_precision(const View& query) {
  ZINIT_CHECK(query.dtype != DType::kFloat32,
              "query must be bfloat16 or float16 where there are many tokens, got float32");
}

}  // namespace zinit::cuda
