// Tensors for the kernels. Each lies in a heap block of its own that is exactly as large as its strides need,
// so AddressSanitizer sees an access one element too far.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "params.h"

namespace zinit::test {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline void write(void* at, DType dtype, float x) {
  if (dtype == DType::kFloat32) {
    std::memcpy(at, &x, 4);
  } else if (dtype == DType::kFloat16) {
    const _Float16 half = static_cast<_Float16>(x);
    std::memcpy(at, &half, 2);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    // Round to nearest even; a NaN keeps its upper half.
    const uint16_t upper =
        std::isnan(x) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    std::memcpy(at, &upper, 2);
  }
}

inline float read(const void* at, DType dtype) {
  float x;
  if (dtype == DType::kFloat32) {
    std::memcpy(&x, at, 4);
  } else if (dtype == DType::kFloat16) {
    _Float16 half;
    std::memcpy(&half, at, 2);
    x = static_cast<float>(half);
  } else {
    uint16_t upper;
    std::memcpy(&upper, at, 2);
    const uint32_t bits = static_cast<uint32_t>(upper) << 16;
    std::memcpy(&x, &bits, 4);
  }
  return x;
}

enum class Layout { kHeadMajor, kTokenMajor };

// [batch, head, token, D], with `gap` unused elements (NaN) between rows.
class Tensor {
 public:
  Tensor() = default;
  Tensor(int64_t batch, int64_t heads, int64_t tokens, int64_t dim, DType dtype, Layout layout,
         int64_t gap = 0)
      : batch_(batch), heads_(heads), tokens_(tokens), dim_(dim), dtype_(dtype) {
    const int64_t row = dim + gap;
    token_stride_ = layout == Layout::kHeadMajor ? row : row * heads;
    head_stride_ = layout == Layout::kHeadMajor ? row * tokens : row;
    batch_stride_ = row * heads * tokens;
    const int64_t rows = batch * heads * tokens;
    elements_ = rows == 0 ? 0 : (rows - 1) * row + dim;
    bytes_ = std::make_unique<uint8_t[]>(elements_ * size_of(dtype));
    fill(kNaN);
  }

  void fill(float x) {
    for (int64_t i = 0; i < elements_; ++i) write(&bytes_[i * size_of(dtype_)], dtype_, x);
  }

  // Every element but those of the gaps.
  template <class F>
  void for_each(F f) {
    for (int64_t b = 0; b < batch_; ++b)
      for (int64_t h = 0; h < heads_; ++h)
        for (int64_t t = 0; t < tokens_; ++t)
          for (int64_t d = 0; d < dim_; ++d) f(at(b, h, t, d));
  }

  void randomize(std::mt19937& random, float scale = 1.f) {
    std::normal_distribution<float> normal(0.f, scale);
    for_each([&](uint8_t* element) { write(element, dtype_, normal(random)); });
  }

  std::vector<float> values() {
    std::vector<float> all;
    for_each([&](uint8_t* element) { all.push_back(read(element, dtype_)); });
    return all;
  }

  uint8_t* at(int64_t b, int64_t h, int64_t t, int64_t d) {
    return &bytes_[(b * batch_stride_ + h * head_stride_ + t * token_stride_ + d) * size_of(dtype_)];
  }

  View view() { return {bytes_.get(), batch_stride_, head_stride_, token_stride_, dtype_, true}; }

 private:
  int64_t batch_ = 0, heads_ = 0, tokens_ = 0, dim_ = 0;
  int64_t batch_stride_ = 0, head_stride_ = 0, token_stride_ = 0, elements_ = 0;
  DType dtype_ = DType::kFloat32;
  std::unique_ptr<uint8_t[]> bytes_;
};

}  // namespace zinit::test
