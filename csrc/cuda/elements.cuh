// Elements in memory, and the floats that the kernels compute with.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../params.h"
#include "block.h"
#include "device.cuh"

namespace zinit::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class T>
constexpr int kPerVector = 16 / sizeof(T);  // elements of a 16-byte load

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, fp16>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

template <class T>
__device__ __forceinline__ void unpack(const uint4& vector, float (&to)[kPerVector<T>]) {
  T elements[kPerVector<T>];
  memcpy(static_cast<void*>(elements), &vector, sizeof vector);
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) to[i] = to_float(elements[i]);
}

// False for NaN too.
__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// Two floats, rounded by one instruction, in one register. `low` is the element that comes first in memory.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, sizeof word);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, sizeof word);
  }
  return word;
}

// f(elements) of data of any dtype. Inside f there is no branch on the dtype for each element: with one, each
// load would wait for the one before.
template <class F>
__device__ __forceinline__ void with_elements(const void* data, DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<const float*>(data));
    case DType::kBFloat16:
      return f(static_cast<const bf16*>(data));
    case DType::kFloat16:
      return f(static_cast<const fp16*>(data));
  }
}

// On the host: f.operator()<T>() for the element type that `dtype` names.
template <class F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f.template operator()<float>();
    case DType::kBFloat16:
      return f.template operator()<bf16>();
    case DType::kFloat16:
      return f.template operator()<fp16>();
  }
  throw std::invalid_argument("there is no dtype " + std::to_string(static_cast<int>(dtype)));
}

// The same for what the tensor cores take.
template <class F>
void with_half_dtype(DType dtype, const F& f) {
  with_dtype(dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 2) return f.template operator()<T>();
    throw std::invalid_argument("the tensor cores take bfloat16 and float16, not float32");
  });
}

// On the host: a grid of blocks.
inline dim3 grid_of(int64_t x, int64_t y, int64_t z) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

// On the host: f.operator()<D>() for a head_dim that the kernels are compiled for.
template <class F>
void with_head_dim(int64_t head_dim, const F& f) {
  switch (head_dim) {
    case 64:
      return f.template operator()<64>();
    case 80:
      return f.template operator()<80>();
    case 96:
      return f.template operator()<96>();
    case 128:
      return f.template operator()<128>();
    case 256:
      return f.template operator()<256>();
  }
  throw std::invalid_argument("head_dim must be 64, 80, 96, 128 or 256, got " + std::to_string(head_dim));
}

template <class T>
__device__ __forceinline__ T* row_of(const View& view, int64_t batch, int64_t head, int64_t token) {
  return static_cast<T*>(view.data) + batch * view.batch + head * view.head + token * view.token;
}

}  // namespace zinit::cuda
