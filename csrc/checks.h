// Checks of one tensor at a time, and new tensors, for the operators of the CPU and of a CUDA device. Each
// check names the argument. Nothing here reads a tensor's elements, so nothing waits for a device.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"
#include "torch_stable.h"

namespace zinit {

// The parts of an error message, of any printable types, in one string.
template <class... Parts>
std::string message_of(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  return text.str();
}

// The condition, or an error that holds the message alone: STD_TORCH_CHECK puts the source line before it.
// The parts are evaluated only where the condition does not hold.
#define ZINIT_CHECK(condition, ...) \
  if (condition) [[likely]] {       \
  } else                            \
    throw std::runtime_error(::zinit::message_of(__VA_ARGS__))

inline std::string shape_string(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

inline std::string layout_name(const Tensor& tensor) {
  using torch::headeronly::Layout;
  switch (tensor.layout()) {
    case Layout::Strided:
      return "strided";
    case Layout::Sparse:
      return "sparse_coo";
    case Layout::SparseCsr:
      return "sparse_csr";
    case Layout::SparseCsc:
      return "sparse_csc";
    case Layout::SparseBsr:
      return "sparse_bsr";
    case Layout::SparseBsc:
      return "sparse_bsc";
    case Layout::Mkldnn:
      return "mkldnn";
    case Layout::Jagged:
      return "jagged";
    default:
      return "an unknown layout";
  }
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
      ZINIT_CHECK(false, name, " must be float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

// -1 in `sizes` leaves that size free.
inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  const auto found = tensor.sizes();
  bool equal = found.size() == sizes.size();
  size_t i = 0;
  for (const int64_t size : sizes) equal = equal && (size < 0 || found[i] == size), ++i;
  if (equal) [[likely]]
    return;
  std::string wanted;
  for (const int64_t size : sizes) {
    wanted += (wanted.empty() ? "" : ", ") + (size < 0 ? std::string("*") : std::to_string(size));
  }
  ZINIT_CHECK(false, name, " must have shape (", wanted, "), got ", shape_string(tensor));
}

// Which of dimensions 1 and 2 of a tensor counts tokens; the other one counts heads.
enum class Layout { kHeadMajor, kTokenMajor };

constexpr int head_dimension(Layout layout) { return layout == Layout::kHeadMajor ? 1 : 2; }
constexpr int token_dimension(Layout layout) { return 3 - head_dimension(layout); }

// ZINIT_POISON_OUTPUTS=1, for tests: every allocation starts as NaN, so that an element which a kernel
// forgets cannot hold the right answer of an earlier call.
inline bool poison_outputs() {
  static const bool poison = [] {
    const char* variable = std::getenv("ZINIT_POISON_OUTPUTS");
    return variable != nullptr && variable[0] == '1';
  }();
  return poison;
}

// The device of an operator: what its tensors must live on, and where it allocates.
class Device {
 public:
  static Device cpu() { return {aoti_torch_device_type_cpu(), 0}; }
  static Device cuda(const Tensor& query) {
    const Device device{aoti_torch_device_type_cuda(), query.is_cuda() ? query.get_device_index() : 0};
    device.check(query, "query");
    return device;
  }

  bool is_cpu() const { return type_ == aoti_torch_device_type_cpu(); }
  int32_t index() const { return index_; }

  // Refuses whatever is not a strided tensor of this device with all of its memory in place: sparse,
  // quantised or meta tensors, and those whose storage was freed or made smaller (as FSDP does with
  // parameters). Returns its memory. Each question to libtorch costs a few ns, and a decoding call asks about
  // 15 tensors: none is asked twice.
  void* check(const Tensor& tensor, const char* name) const {
    const AtenTensorHandle handle = tensor.get();
    int32_t type = 0, index = 0, layout = 0, dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &type));
    if (!is_cpu()) TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &index));
    ZINIT_CHECK(type == type_ && index == index_, name, " must be on ", spell(type_, index_), ", got ",
                spell(type, tensor.get_device_index()));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
    ZINIT_CHECK(layout == aoti_torch_layout_strided(), name, " must be strided (dense), got ",
                layout_name(tensor), ": use .to_dense()");
    int64_t last = 0, stored = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &last));
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    bool empty = false;
    for (size_t i = 0; i < sizes.size(); ++i) {
      empty = empty || sizes[i] == 0;
      last += (sizes[i] - 1) * strides[i];
    }
    void* data = nullptr;
    if (empty) return data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &stored));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    const int64_t needed = (last + 1) * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
    ZINIT_CHECK(needed <= stored, name, " has no memory for all of its elements: they need ", needed,
                " bytes, its storage has ", stored);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    ZINIT_CHECK(data != nullptr, name, " has elements, but no memory");
    return data;
  }

  // A tensor of four dimensions through its strides.
  View view(const Tensor& tensor, const char* name, Layout layout) const {
    void* data = check(tensor, name);
    const auto strides = tensor.strides();
    ZINIT_CHECK(strides.size() == 4, name, " must have 4 dimensions, got shape ", shape_string(tensor));
    ZINIT_CHECK(strides[3] == 1 || data == nullptr || tensor.size(3) <= 1, name,
                " must be contiguous in its last dimension, got stride ", strides[3]);
    return {data,
            strides[0],
            strides[head_dimension(layout)],
            strides[token_dimension(layout)],
            dtype_of(tensor, name),
            true};
  }

  // The same for what a kernel reads 16 bytes at a time.
  View aligned_view(const Tensor& tensor, const char* name, Layout layout) const {
    const View v = view(tensor, name, layout);
    const auto element_bytes = static_cast<int64_t>(tensor.element_size());
    for (int64_t i = 0; i < 3; ++i) {
      ZINIT_CHECK(tensor.size(i) <= 1 || tensor.stride(i) * element_bytes % 16 == 0, name,
                  ": its rows must start at multiples of 16 bytes, got stride ", tensor.stride(i),
                  " in dimension ", i);
    }
    ZINIT_CHECK(reinterpret_cast<uintptr_t>(v.data) % 16 == 0, name, " must start at a multiple of 16 bytes");
    return v;
  }

  // A contiguous tensor of the given sizes (-1: any) that kernels read as a plain array.
  template <class T>
  Array<const T> array(const Tensor& tensor, const char* name, ScalarType dtype,
                       std::initializer_list<int64_t> sizes) const {
    const void* data = check(tensor, name);
    check_shape(tensor, name, sizes);
    ZINIT_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
    ZINIT_CHECK(tensor.is_contiguous(), name, " must be contiguous");
    return {static_cast<const T*>(data), true};
  }
  template <class T>
  Array<const T> array(const OptionalTensor& tensor, const char* name, ScalarType dtype,
                       std::initializer_list<int64_t> sizes) const {
    return tensor.has_value() ? array<T>(*tensor, name, dtype, sizes) : Array<const T>{};
  }

  Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                       ScalarType dtype) const {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), type_, index_, &handle));
    Tensor tensor(handle);
    if (poison_outputs()) {
      constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kNoIndex = -1e9;
      torch::stable::fill_(tensor, dtype == ScalarType::Long ? kNoIndex : kNaN);
    }
    return tensor;
  }

  Tensor empty_contiguous(const std::vector<int64_t>& sizes, ScalarType dtype) const {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
    return empty_strided(sizes, strides, dtype);
  }

  // [B, H, T, D] stored as [B, T, H, D]: the layout that a following projection reads without a copy.
  Tensor empty_token_major(int64_t B, int64_t H, int64_t T, int64_t D, ScalarType dtype) const {
    const auto at_least_1 = [](int64_t n) { return n > 0 ? n : 1; };
    const int64_t token = at_least_1(H) * at_least_1(D);
    return empty_strided({B, H, T, D}, {at_least_1(T) * token, at_least_1(D), token, 1}, dtype);
  }

 private:
  Device(int32_t type, int32_t index) : type_(type), index_(index) {}

  static std::string spell(int32_t type, int32_t index) {
    if (type == aoti_torch_device_type_cpu()) return "the CPU";
    if (type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(index);
    if (type == aoti_torch_device_type_meta()) return "meta (a tensor without elements)";
    return "a device of another kind (" + std::to_string(type) + ")";
  }

  int32_t type_, index_;
};

}  // namespace zinit
