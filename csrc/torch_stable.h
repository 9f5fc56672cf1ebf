// What every binding shares: libtorch's stable ABI, checks that name what came, views of tensors, the thread
// loop.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "params.h"

namespace zinit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_string(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

// -1 in `sizes` leaves that size free.
inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  bool equal = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) equal = equal && (size < 0 || tensor.size(i) == size), ++i;
  if (equal) return;
  std::string wanted;
  for (const int64_t size : sizes) {
    wanted += (wanted.empty() ? "" : ", ") + (size < 0 ? std::string("*") : std::to_string(size));
  }
  STD_TORCH_CHECK(false, name, " must have shape (", wanted, "), got ", shape_string(tensor));
}

// A small argument that kernels read as a plain array: float32 or int32, contiguous, of the given sizes.
template <class T>
const T* array_of(const OptionalTensor& tensor, const char* name, ScalarType dtype,
                  std::initializer_list<int64_t> sizes) {
  if (!tensor.has_value()) return nullptr;
  check_shape(*tensor, name, sizes);
  STD_TORCH_CHECK(tensor->is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor->scalar_type());
  STD_TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous");
  return static_cast<const T*>(tensor->const_data_ptr());
}

// Which of dimensions 1 and 2 of a tensor counts tokens; the other one counts heads.
enum class Layout { kHeadMajor, kTokenMajor };

constexpr int head_dimension(Layout layout) { return layout == Layout::kHeadMajor ? 1 : 2; }
constexpr int token_dimension(Layout layout) { return 3 - head_dimension(layout); }

// A tensor of four dimensions through its strides.
inline View view_of(const Tensor& tensor, const char* name, Layout layout = Layout::kHeadMajor) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must have 4 dimensions, got shape ", shape_string(tensor));
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(tensor.stride(3) == 1 || tensor.size(3) <= 1 || tensor.numel() == 0, name,
                  " must be contiguous in its last dimension, got stride ", tensor.stride(3));
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(head_dimension(layout)),
          tensor.stride(token_dimension(layout)), dtype_of(tensor, name)};
}

// ZINIT_POISON_OUTPUTS=1, for tests: every allocation starts as NaN (0xff.. is one in all three dtypes), so
// that an element which a kernel forgets cannot hold an earlier call's right answer.
inline bool poison_outputs() {
  static const bool poison = [] {
    const char* variable = std::getenv("ZINIT_POISON_OUTPUTS");
    return variable != nullptr && variable[0] == '1';
  }();
  return poison;
}

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            ScalarType dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  if (poison_outputs()) {  // all allocations here are dense, whatever the order of their dimensions
    std::memset(tensor.mutable_data_ptr(), 0xff, static_cast<size_t>(tensor.numel()) * tensor.element_size());
  }
  return tensor;
}

inline Tensor empty_contiguous(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
  return empty_strided(sizes, strides, dtype);
}

// [B, H, T, D] stored as [B, T, H, D]: the layout a following projection reads without a copy.
inline Tensor empty_token_major(int64_t B, int64_t H, int64_t T, int64_t D, ScalarType dtype) {
  const auto at_least_1 = [](int64_t n) { return n > 0 ? n : 1; };
  const int64_t token = at_least_1(H) * at_least_1(D);
  return empty_strided({B, H, T, D}, {at_least_1(T) * token, at_least_1(D), token, 1}, dtype);
}

}  // namespace zinit
