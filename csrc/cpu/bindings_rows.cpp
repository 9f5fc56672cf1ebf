// zinit::rms_norm_cpu, swiglu_cpu, rotate_cpu, their gradients, and cross_entropy_cpu: what a training step does
// between its matrix products.
#include <memory>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "run_stage.h"

namespace zinit::cpu {
namespace {

std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

int64_t elements_of(const Tensor& tensor) {
  int64_t count = 1;
  for (const int64_t size : tensor.sizes()) count *= size;
  return count;
}

// The memory of a contiguous tensor with the dtype and the shape of another one.
const void* data_like(const Tensor& tensor, const char* name, const Tensor& like, const char* of) {
  const void* data = Device::cpu().check(tensor, name);
  ZINIT_CHECK(sizes_of(tensor) == sizes_of(like), name, " must have the shape of ", of, ", ",
              shape_string(like), ", got ", shape_string(tensor));
  ZINIT_CHECK(tensor.scalar_type() == like.scalar_type(), name, " must have the dtype of ", of, ", ",
              like.scalar_type(), ", got ", tensor.scalar_type());
  ZINIT_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return data;
}

// Rows and columns of a tensor whose last dimension is a row.
std::pair<int64_t, int64_t> rows_and_columns(const Tensor& x) {
  ZINIT_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "x must have rows of at least one element, got shape ",
              shape_string(x));
  const int64_t columns = x.size(x.dim() - 1);
  return {elements_of(x) / columns, columns};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Device device = Device::cpu();
  const auto [rows, columns] = rows_and_columns(x);
  NormWork w{};
  w.num_rows = rows, w.columns = columns, w.eps = static_cast<float>(eps), w.dtype = dtype_of(x, "x");
  w.input = data_like(x, "x", x, "x");
  w.norm_weight = device.array<void>(weight, "weight", x.scalar_type(), {columns}).data;
  Tensor out = device.empty_contiguous(sizes_of(x), x.scalar_type());
  std::vector<int64_t> one_each = sizes_of(x);
  one_each.back() = 1;
  Tensor rstd = device.empty_contiguous(one_each, ScalarType::Float);
  w.out = out.data_ptr(), w.rstd = static_cast<float*>(rstd.data_ptr());
  run_stage(kernels().norm, w);
  return {out, rstd};
}

Tensor rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  const Device device = Device::cpu();
  const auto [rows, columns] = rows_and_columns(x);
  NormBackwardWork w{};
  w.num_rows = rows, w.columns = columns, w.dtype = dtype_of(x, "x");
  w.x = data_like(x, "x", x, "x"), w.grad = data_like(grad, "grad", x, "x");
  w.weight = device.array<float>(weight, "weight", ScalarType::Float, {columns}).data;
  ZINIT_CHECK(elements_of(rstd) == rows, "rstd must have one element for each of the ", rows,
              " rows, got shape ", shape_string(rstd));
  ZINIT_CHECK(rstd.scalar_type() == ScalarType::Float && rstd.is_contiguous(),
              "rstd must be contiguous and float32");
  w.rstd = static_cast<const float*>(device.check(rstd, "rstd"));
  Tensor grad_x = device.empty_contiguous(sizes_of(x), x.scalar_type());
  w.grad_x = grad_x.data_ptr();
  run_stage(kernels().norm_backward, w);
  return grad_x;
}

SwigluWork swiglu_of(const Tensor& gate, const Tensor& up) {
  SwigluWork w{};
  w.count = elements_of(gate), w.dtype = dtype_of(gate, "gate");
  w.gate = data_like(gate, "gate", gate, "gate"), w.up = data_like(up, "up", gate, "gate");
  return w;
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  SwigluWork w = swiglu_of(gate, up);
  Tensor out = Device::cpu().empty_contiguous(sizes_of(gate), gate.scalar_type());
  w.out = out.data_ptr();
  run_stage(kernels().swiglu, w);
  return out;
}

std::tuple<Tensor, Tensor> swiglu_gradients(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const Device device = Device::cpu();
  SwigluWork w = swiglu_of(gate, up);
  w.grad = data_like(grad, "grad", gate, "gate");
  Tensor grad_gate = device.empty_contiguous(sizes_of(gate), gate.scalar_type());
  Tensor grad_up = device.empty_contiguous(sizes_of(gate), gate.scalar_type());
  w.grad_gate = grad_gate.data_ptr(), w.grad_up = grad_up.data_ptr();
  run_stage(kernels().swiglu, w);
  return {grad_gate, grad_up};
}

Tensor rotate_heads(const Tensor& x, const Tensor& cos, const Tensor& sin, bool backwards) {
  const Device device = Device::cpu();
  ZINIT_CHECK(x.dim() >= 2, "x must have shape (..., heads, D), got ", shape_string(x));
  RotateWork w{};
  w.head_dim = x.size(x.dim() - 1), w.num_heads = x.size(x.dim() - 2), w.dtype = dtype_of(x, "x");
  ZINIT_CHECK(w.head_dim >= 2 && w.head_dim % 2 == 0 && w.num_heads >= 1,
              "x must have heads of an even number of elements, got shape ", shape_string(x));
  w.num_tokens = elements_of(x) / (w.num_heads * w.head_dim);
  w.x = data_like(x, "x", x, "x");
  w.table_rows = elements_of(cos) / (w.head_dim / 2);
  w.cos = device.array<float>(cos, "cos", ScalarType::Float, {w.table_rows, w.head_dim / 2}).data;
  w.sin = device.array<float>(sin, "sin", ScalarType::Float, {w.table_rows, w.head_dim / 2}).data;
  ZINIT_CHECK(w.num_tokens == 0 || (w.table_rows > 0 && w.num_tokens % w.table_rows == 0), "the ",
              w.num_tokens, " tokens of x must be a multiple of the ", w.table_rows, " rows of cos");
  w.backwards = backwards;
  Tensor out = device.empty_contiguous(sizes_of(x), x.scalar_type());
  w.out = out.data_ptr();
  run_stage(kernels().rotate, w);
  return out;
}

Tensor cross_entropy(const Tensor& logits, const Tensor& targets, bool wants_gradient) {
  const Device device = Device::cpu();
  ZINIT_CHECK(logits.dim() == 2, "logits must have shape (rows, vocabulary), got ", shape_string(logits));
  CrossEntropyWork w{};
  w.num_rows = logits.size(0), w.columns = logits.size(1), w.dtype = dtype_of(logits, "logits");
  w.logits = const_cast<void*>(data_like(logits, "logits", logits, "logits"));
  const auto given = device.array<int64_t>(targets, "targets", ScalarType::Long, {w.num_rows});
  // read once: another thread may write to the tensor
  const auto copies = std::make_unique_for_overwrite<int64_t[]>(static_cast<size_t>(w.num_rows));
  for (int64_t i = 0; i < w.num_rows; ++i) {
    copies[i] = __atomic_load_n(given.data + i, __ATOMIC_RELAXED);
    ZINIT_CHECK(copies[i] >= 0 && copies[i] < w.columns, "targets[", i, "] must lie in 0 .. ", w.columns - 1,
                ", got ", copies[i]);
  }
  w.targets = copies.get(), w.wants_gradient = wants_gradient;
  Tensor loss = device.empty_contiguous({w.num_rows}, ScalarType::Float);
  w.loss = static_cast<float*>(loss.data_ptr());
  run_stage(kernels().cross_entropy, w);
  return loss;
}

Tensor choose(const Tensor& logits, double temperature, double top_p, const Tensor& seeds) {
  const Device device = Device::cpu();
  ZINIT_CHECK(logits.dim() == 2, "logits must have shape (B, vocab_size), got ", shape_string(logits));
  const int64_t B = logits.size(0), V = logits.size(1);
  ZINIT_CHECK(V >= 1 && V < (int64_t{1} << 31), "logits must have 1 to 2^31 - 1 columns, got ", V);
  ZINIT_CHECK(temperature >= 0 && top_p > 0,
              "temperature must not be negative and top_p must be positive, got ", temperature, " and ",
              top_p);
  ChoiceWork w{};
  w.num_rows = B, w.columns = V, w.dtype = dtype_of(logits, "logits");
  w.logits = device.array<void>(logits, "logits", logits.scalar_type(), {B, V}).data;
  w.temperature = temperature, w.top_p = top_p;
  const auto* given =
      device.array<int64_t>(seeds, "seeds", ScalarType::Long, {temperature == 0 ? -1 : B}).data;
  w.seeds = reinterpret_cast<const uint64_t*>(given);
  Tensor chosen = device.empty_contiguous({B}, ScalarType::Long);
  w.chosen = static_cast<int64_t*>(chosen.data_ptr());
  run_stage(kernels().choice, w);
  return chosen;
}

}  // namespace
}  // namespace zinit::cpu

STABLE_TORCH_LIBRARY_IMPL(zinit, CompositeExplicitAutograd, m) {
  m.impl("rms_norm_cpu", TORCH_BOX(&zinit::cpu::rms_norm));
  m.impl("rms_norm_backward_cpu", TORCH_BOX(&zinit::cpu::rms_norm_backward));
  m.impl("swiglu_cpu", TORCH_BOX(&zinit::cpu::swiglu));
  m.impl("swiglu_backward_cpu", TORCH_BOX(&zinit::cpu::swiglu_gradients));
  m.impl("rotate_cpu", TORCH_BOX(&zinit::cpu::rotate_heads));
  m.impl("cross_entropy_cpu", TORCH_BOX(&zinit::cpu::cross_entropy));
  m.impl("choose_cpu", TORCH_BOX(&zinit::cpu::choose));
}
