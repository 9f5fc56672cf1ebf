// What the bindings of this folder share: prompts, limits of the kernels, torch's current stream.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "arguments.h"
#include "block.h"

// It lies in libtorch_cuda; weak, so that this file loads into a torch without CUDA too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace zinit::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* operation) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, operation, " was not launched: ", cudaGetErrorString(error));
}

inline void set_prompt(AttentionParams& p, const Device& device, Layout layout, const OptionalTensor& key,
                       const OptionalTensor& value, const OptionalTensor& gate, const OptionalTensor& index) {
  STD_TORCH_CHECK(key.has_value() == value.has_value() && key.has_value() == gate.has_value(),
                  "prompt_key, prompt_value and gate must be given together or not at all");
  if (!key.has_value()) return;
  p.prompt_key = device.view(*key, "prompt_key", layout);
  p.prompt_value = device.view(*value, "prompt_value", layout);
  const int64_t N = key->size(0), P = key->size(token_dimension(layout)), Hkv = p.num_heads_kv;
  const bool head_major = layout == Layout::kHeadMajor;
  const std::initializer_list<int64_t> shape = {N, head_major ? Hkv : P, head_major ? P : Hkv, p.head_dim};
  check_shape(*key, "prompt_key", shape);
  check_shape(*value, "prompt_value", shape);
  p.prompt_rows = N, p.prompt_length = P;
  STD_TORCH_CHECK(p.prompt_length <= 128, "prompt_key must hold at most 128 prompts, got ", p.prompt_length);
  const bool has_rows = gate->dim() == 2;
  p.gate_rows = has_rows ? gate->size(0) : 1;
  p.gate = has_rows ? device.array<float>(gate, "gate", ScalarType::Float, {p.gate_rows, p.num_heads_q})
                    : device.array<float>(gate, "gate", ScalarType::Float, {p.num_heads_q});
  STD_TORCH_CHECK(p.gate_rows == 1 || p.gate_rows == p.prompt_rows,
                  "gate must have 1 row or one per prompt table row (", p.prompt_rows, "), got ",
                  p.gate_rows);
  p.prompt_index = device.array<int32_t>(index, "prompt_index", ScalarType::Int, {p.num_sequences});
  STD_TORCH_CHECK(index.has_value() || p.prompt_rows == 1 || p.prompt_rows == p.num_sequences,
                  "prompt_key must have 1 row or one per sequence (", p.num_sequences,
                  ") where no prompt_index is given, got ", p.prompt_rows);
}

// What all kernels were compiled for.
inline void check_limits(const AttentionParams& p) {
  const int64_t D = p.head_dim;
  STD_TORCH_CHECK(D == 64 || D == 80 || D == 96 || D == 128 || D == 256,
                  "head_dim must be 64, 80, 96, 128 or 256, got ", D);
  STD_TORCH_CHECK(p.num_heads_kv > 0 && p.num_heads_q > 0 && p.num_heads_q % p.num_heads_kv == 0, "the ",
                  p.num_heads_q, " query heads must be a multiple of the ", p.num_heads_kv,
                  " key/value heads");
  STD_TORCH_CHECK(p.num_sequences <= 65535 && p.num_heads_q <= 65535, "at most 65535 sequences and heads");
}

// What the tensor cores take.
inline void check_half_precision(const View& query) {
  STD_TORCH_CHECK(query.dtype != DType::kFloat32,
                  "query must be bfloat16 or float16 where there are many tokens, got float32");
}

}  // namespace zinit::cuda
