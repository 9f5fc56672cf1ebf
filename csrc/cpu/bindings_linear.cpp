// zinit::linear_cpu and zinit::unpack_cpu: products of a few rows, and packed weights as numbers.
#include <algorithm>

#include "linear_arguments.h"
#include "plan.h"
#include "run_steps.h"

namespace zinit::cpu {
namespace {

constexpr int64_t kRowsOfAStep = 32;

const char* bytes_at(const Tensor& tensor, int64_t row, int64_t columns) {
  return static_cast<const char*>(tensor.data_ptr()) +
         row * columns * static_cast<int64_t>(tensor.element_size());
}

Tensor linear(const Tensor& input, const Tensor& weight, int64_t rows, int64_t scheme) {
  const Device device = Device::cpu();
  ZINIT_CHECK(input.dim() == 2, "input must have 2 dimensions, got shape ", shape_string(input));
  const int64_t M = input.size(0), K = input.size(1);
  const ScalarType dtype = input.scalar_type();
  device.array<void>(input, "input", dtype, {M, K});
  LinearWork w{};
  w.dtype = dtype_of(input, "input");
  w.num_weights = 1;
  w.weights[0] = weight_of(weight, "weight", rows, K, scheme, dtype);
  Tensor out = device.empty_contiguous({M, rows}, dtype);
  if (M > kRowsOfAStep && rows > 0 && w.weights[0].scheme.packed() && kernels().has_many_rows) {
    w.num_rows = M, w.input = input.data_ptr(), w.out[0] = out.data_ptr();
    run_stage(kernels().many, plan_many(w, torch::stable::get_num_threads()));
    return out;
  }
  for (int64_t m = 0; m < M && rows > 0; m += kRowsOfAStep) {
    w.num_rows = std::min(M - m, kRowsOfAStep);
    w.input = bytes_at(input, m, K);
    w.out[0] = const_cast<char*>(bytes_at(out, m, rows));
    run_steps({step_of(kernels().linear, w)});
  }
  return out;
}

Tensor unpack(const Tensor& weight, int64_t rows, int64_t columns, int64_t scheme,
              const OptionalTensor& indices, const Tensor& like) {
  const Device device = Device::cpu();
  UnpackWork w{};
  w.dtype = dtype_of(like, "like");
  w.weight = weight_of(weight, "weight", rows, columns, scheme, like.scalar_type());
  ZINIT_CHECK(w.weight.scheme.packed(), "scheme must name a packed weight, got 0");
  w.num_rows = rows;
  std::unique_ptr<int64_t[]> copies;  // read once: another thread may write to the tensor
  if (indices.has_value()) {
    const auto given = device.array<int64_t>(*indices, "indices", ScalarType::Long, {-1});
    w.num_rows = indices->size(0);
    copies = std::make_unique_for_overwrite<int64_t[]>(static_cast<size_t>(w.num_rows));
    for (int64_t i = 0; i < w.num_rows; ++i) {
      copies[i] = __atomic_load_n(given.data + i, __ATOMIC_RELAXED);
      ZINIT_CHECK(copies[i] >= 0 && copies[i] < rows, "indices[", i, "] must lie in 0 .. ", rows - 1,
                  ", got ", copies[i]);
    }
    w.indices = copies.get();
  }
  Tensor out = device.empty_contiguous({w.num_rows, columns}, like.scalar_type());
  w.out = out.data_ptr();
  run_stage(kernels().unpack, w);
  return out;
}

}  // namespace
}  // namespace zinit::cpu

STABLE_TORCH_LIBRARY_IMPL(zinit, CompositeExplicitAutograd, m) {
  m.impl("linear_cpu", TORCH_BOX(&zinit::cpu::linear));
  m.impl("unpack_cpu", TORCH_BOX(&zinit::cpu::unpack));
}
