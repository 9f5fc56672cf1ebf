// What a model does between its matrix products: the gradient of a norm, SwiGLU, rotary embedding, the
// cross-entropy and the choice of a token. Every operand lies in a heap block of exactly its size.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "linear_cases.h"

namespace zinit::test {

struct RowCase {
  const char* name;
  int64_t rows = 6, columns = 40;
  int64_t heads = 3, head_dim = 10;
};

inline const RowCase kRowCases[] = {
    {.name = "one of everything", .rows = 1, .columns = 1, .heads = 1, .head_dim = 2},
    {.name = "no rows", .rows = 0},
    {.name = "short rows"},
    {.name = "whole vectors", .rows = 5, .columns = 64, .heads = 2, .head_dim = 32},
    {.name = "several items", .rows = 50, .columns = 1001, .heads = 9, .head_dim = 66},
};

// run(stage, work, threads) is check_kernels.cpp's.
template <class Run>
std::vector<std::pair<std::string, std::vector<float>>> rows(const cpu::KernelTable& table, const RowCase& c,
                                                             DType dtype, int threads, Run run) {
  std::mt19937 random(11);
  const int64_t count = c.rows * c.columns, turned = c.rows * c.heads * c.head_dim, half = c.head_dim / 2;
  const SomeMatrix x(count, dtype, &random), y(count, dtype, &random), grad(count, dtype, &random);
  const SomeMatrix weight(c.columns, DType::kFloat32, &random), rstd(c.rows, DType::kFloat32, &random);
  const auto floats = [](const SomeMatrix& matrix) { return reinterpret_cast<float*>(matrix.bytes.get()); };
  std::vector<std::pair<std::string, std::vector<float>>> results;

  const SomeMatrix grad_x(count, dtype, nullptr);
  cpu::NormBackwardWork norm{c.rows,       c.columns, grad.bytes.get(),  x.bytes.get(), floats(weight),
                             floats(rstd), dtype,     grad_x.bytes.get()};
  run(table.norm_backward, norm, threads);
  results.emplace_back("gradient of the norm", grad_x.values());

  const SomeMatrix out(count, dtype, nullptr), grad_gate(count, dtype, nullptr),
      grad_up(count, dtype, nullptr);
  cpu::SwigluWork swiglu{};
  swiglu.count = count, swiglu.gate = x.bytes.get(), swiglu.up = y.bytes.get(), swiglu.dtype = dtype;
  swiglu.out = out.bytes.get();
  run(table.swiglu, swiglu, threads);
  results.emplace_back("SwiGLU", out.values());
  swiglu.grad = grad.bytes.get();
  swiglu.grad_gate = grad_gate.bytes.get(), swiglu.grad_up = grad_up.bytes.get();
  run(table.swiglu, swiglu, threads);
  results.emplace_back("gradient of the gate", grad_gate.values());
  results.emplace_back("gradient of up", grad_up.values());

  const SomeMatrix heads(turned, dtype, &random), rotated(turned, dtype, nullptr);
  const SomeMatrix cos(c.rows * half, DType::kFloat32, &random), sin(c.rows * half, DType::kFloat32, &random);
  cpu::RotateWork rotate{c.rows, c.heads, c.head_dim, heads.bytes.get(),  floats(cos), floats(sin),
                         c.rows, false,   dtype,      rotated.bytes.get()};
  run(table.rotate, rotate, threads);
  results.emplace_back("rotated", rotated.values());

  // the first tokens of three sequences, the second without any
  const int64_t kv = c.heads, D = c.head_dim, capacity = c.rows + 2, cached = 3 * kv * capacity * D;
  const SomeMatrix query(2 * turned, dtype, &random), key(turned, dtype, &random),
      value(turned, dtype, &random);
  const SomeMatrix keys(cached, dtype, nullptr), values(cached, dtype, nullptr);
  const int32_t cu[] = {0, static_cast<int32_t>(c.rows / 3), static_cast<int32_t>(c.rows / 3),
                        static_cast<int32_t>(c.rows)};
  const auto packed = [&](const SomeMatrix& matrix, int64_t number) {
    return View{matrix.bytes.get(), 0, D, number * D, dtype, true};
  };
  const auto cache = [&](const SomeMatrix& matrix) {
    return View{matrix.bytes.get(), kv * capacity * D, capacity * D, D, dtype, true};
  };
  cpu::DecodeWork fill{};
  fill.num_sequences = 3, fill.num_heads_q = 2 * kv, fill.num_heads_kv = kv, fill.head_dim = D;
  fill.cu_seqlens_q = {cu, true};
  fill.query = packed(query, 2 * kv), fill.new_key = packed(key, kv), fill.new_value = packed(value, kv);
  fill.key_cache = cache(keys), fill.value_cache = cache(values);
  fill.rotary = {floats(cos), floats(sin), half, c.rows, D, DType::kFloat32, false, true, true};
  run(table.cache_fill, fill, threads);
  results.emplace_back("rotated queries", query.values());
  results.emplace_back("rotated keys", key.values());
  results.emplace_back("filled key cache", keys.values());
  results.emplace_back("filled value cache", values.values());

  std::vector<uint64_t> seeds;
  for (int64_t i = 0; i < c.rows; ++i) seeds.push_back(random() * 0x123456789abcdefull);
  const std::vector<std::pair<double, double>> ways = {{0, 1}, {0.7, 0.6}, {2, 1}, {1e-200, 0.5}};
  for (const auto& [temperature, top_p] : ways) {
    std::vector<int64_t> chosen(static_cast<size_t>(c.rows), -2);
    run(table.choice,
        cpu::ChoiceWork{c.rows, c.columns, x.bytes.get(), dtype, temperature, top_p, seeds.data(),
                        chosen.data()},
        threads);
    results.emplace_back("chosen at " + std::to_string(temperature),
                         std::vector<float>(chosen.begin(), chosen.end()));
  }

  std::vector<int64_t> targets;
  for (int64_t i = 0; i < c.rows; ++i) targets.push_back(i == 0 ? c.columns - 1 : i * 7 % c.columns);
  const SomeMatrix loss(c.rows, DType::kFloat32, nullptr);
  cpu::CrossEntropyWork entropy{c.rows, c.columns, x.bytes.get(), targets.data(), floats(loss), dtype, false};
  run(table.cross_entropy, entropy, threads);
  results.emplace_back("loss", loss.values());
  entropy.wants_gradient = true;
  run(table.cross_entropy, entropy, threads);
  results.emplace_back("gradient of the loss", x.values());
  return results;
}

}  // namespace zinit::test
