// Tensors of one CUDA device, checked as far as the host can see without waiting for it.
#pragma once
#include "../torch_stable.h"

namespace zinit::cuda {

struct Device {
  int32_t index;

  void check(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == index, name, " must be on cuda:", index,
                    ", where the query is");
  }

  // A tensor of four dimensions through its strides.
  View view(const Tensor& tensor, const char* name, Layout layout = Layout::kTokenMajor) const {
    STD_TORCH_CHECK(tensor.dim() == 4, name, " must have 4 dimensions, got shape ", shape_string(tensor));
    check(tensor, name);
    STD_TORCH_CHECK(tensor.stride(3) == 1 || tensor.numel() == 0, name,
                    " must be contiguous in its last dimension, got stride ", tensor.stride(3));
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(head_dimension(layout)),
            tensor.stride(token_dimension(layout)), dtype_of(tensor, name)};
  }

  // As above, for what is read 16 bytes at a time.
  View aligned_view(const Tensor& tensor, const char* name, Layout layout = Layout::kTokenMajor) const {
    const View v = view(tensor, name, layout);
    const auto element_bytes = static_cast<int64_t>(tensor.element_size());
    for (int64_t i = 0; i < 3; ++i) {
      STD_TORCH_CHECK(tensor.size(i) <= 1 || tensor.stride(i) * element_bytes % 16 == 0, name,
                      ": its rows must start at multiples of 16 bytes, got stride ", tensor.stride(i),
                      " in dimension ", i);
    }
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(v.data) % 16 == 0, name,
                    " must start at a multiple of 16 bytes");
    return v;
  }

  template <class T>
  const T* array(const OptionalTensor& tensor, const char* name, ScalarType dtype,
                 std::initializer_list<int64_t> sizes) const {
    if (!tensor.has_value()) return nullptr;
    check_shape(*tensor, name, sizes);
    check(*tensor, name);
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, " must be ", dtype, ", got ",
                    tensor->scalar_type());
    STD_TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous");
    return static_cast<const T*>(tensor->const_data_ptr());
  }

  Tensor empty_contiguous(const std::vector<int64_t>& sizes, ScalarType dtype) const {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
    return empty_strided(sizes, strides, dtype);
  }

  Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                       ScalarType dtype) const {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                 aoti_torch_device_type_cuda(), index, &handle));
    return Tensor(handle);
  }
};

}  // namespace zinit::cuda
