// Products of a few rows with plain and packed weights, a norm before them, a gate or a residual behind, and
// packed weights as numbers. Every operand lies in a heap block of exactly its size.
#pragma once
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "tensors.h"

namespace zinit::test {

struct LinearCase {
  const char* name;
  int64_t M = 3, N = 37, K = 100;
  int64_t schemes[3] = {0, 0, 0};
  int num_weights = 1;
  bool norm = false, residual = false, gated = false;
};

constexpr int64_t kInt8 = 8 + 256 * 32, kInt8Wide = 8 + 256 * 128, kInt4 = 4 + 256 * 32,
                  kInt4Min = 4 + 16 + 256 * 64;

inline const LinearCase kLinearCases[] = {
    {.name = "one of everything", .M = 1, .N = 1, .K = 1},
    {.name = "no rows", .M = 0},
    {.name = "one row", .M = 1, .N = 130, .K = 576},
    {.name = "many rows", .M = 33, .N = 50, .K = 65},
    {.name = "long rows", .M = 9, .N = 19, .K = 5001},
    {.name = "three weights, normed", .M = 5, .num_weights = 3, .norm = true},
    {.name = "with a residual", .M = 9, .N = 49, .residual = true},
    {.name = "gated", .M = 2, .N = 77, .num_weights = 2, .norm = true, .gated = true},
    {.name = "8 bits", .M = 1, .schemes = {kInt8}},
    {.name = "8 bits, wide groups, many rows",
     .M = 19,
     .N = 16,
     .K = 256,
     .schemes = {kInt8Wide},
     .residual = true},
    {.name = "4 bits", .M = 4, .N = 130, .K = 33, .schemes = {kInt4}},
    {.name = "4 bits with a min, gated",
     .M = 3,
     .schemes = {kInt4Min, kInt4Min},
     .num_weights = 2,
     .gated = true},
    {.name = "of every kind", .M = 8, .schemes = {kInt4, kInt8Wide, 0}, .num_weights = 3, .norm = true},
};

// A weight in a heap block of exactly its size.
struct SomeWeight {
  std::unique_ptr<uint8_t[]> bytes;
  cpu::LinearWeight weight;

  SomeWeight(int64_t rows, int64_t columns, int64_t scheme, DType dtype, std::mt19937& random) {
    weight.rows = rows, weight.columns = columns, weight.dtype = dtype, weight.scheme = {scheme};
    std::normal_distribution<float> normal(0.f, 0.1f);
    if (scheme == 0) {
      bytes = std::make_unique<uint8_t[]>(rows * columns * size_of(dtype));
      for (int64_t i = 0; i < rows * columns; ++i) write(&bytes[i * size_of(dtype)], dtype, normal(random));
    } else {
      const int64_t panels = (rows + 15) / 16, panel = weight.scheme.panel_bytes(columns);
      bytes = std::make_unique<uint8_t[]>(panels * panel);
      for (int64_t i = 0; i < panels * panel; ++i) {
        const int64_t at = i % panel,
                      scales = weight.scheme.groups(columns) * (weight.scheme.has_min() ? 64 : 32);
        if (at >= scales) {
          bytes[i] = static_cast<uint8_t>(random());
        } else if (at % 2 == 0) {
          write(&bytes[i], DType::kFloat16, 0.01f * normal(random));
        }
      }
    }
    weight.data = bytes.get();
  }
};

// A matrix in a heap block of exactly its size.
struct SomeMatrix {
  std::unique_ptr<uint8_t[]> bytes;
  int64_t count;
  DType dtype;

  SomeMatrix(int64_t elements, DType dtype, std::mt19937* random)
      : bytes(std::make_unique<uint8_t[]>(elements * size_of(dtype))), count(elements), dtype(dtype) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      write(&bytes[i * size_of(dtype)], dtype, random == nullptr ? kNaN : normal(*random));
    }
  }
  std::vector<float> values() const {
    std::vector<float> all;
    for (int64_t i = 0; i < count; ++i) all.push_back(read(&bytes[i * size_of(dtype)], dtype));
    return all;
  }
};

// x as an element of this dtype.
inline float rounded(double x, DType dtype) {
  uint8_t element[4];
  write(element, dtype, static_cast<float>(x));
  return read(element, dtype);
}

// out[i] of many rows, by its definition.
inline std::vector<float> by_definition(const cpu::LinearWork& w, int i, const SomeMatrix& x,
                                        const SomeMatrix& residual,
                                        const std::vector<std::vector<float>>& weights) {
  const int64_t N = w.weights[i].rows, K = w.weights[i].columns;
  const std::vector<float> a = x.values(), added = residual.values();
  std::vector<float> found;
  for (int64_t m = 0; m < w.num_rows; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      const auto product = [&](const std::vector<float>& weight) {
        double sum = 0;
        for (int64_t k = 0; k < K; ++k) sum += static_cast<double>(a[m * K + k]) * weight[n * K + k];
        return sum;
      };
      double sum = product(weights[i]);
      if (w.gated) {
        const double gate = rounded(sum, w.dtype), up = rounded(product(weights[1]), w.dtype);
        sum = rounded(gate / (1 + std::exp(-gate)), w.dtype) * up;
      }
      if (w.residual != nullptr && i == 0) sum += added[m * N + n];
      found.push_back(rounded(sum, w.dtype));
    }
  }
  return found;
}

// The same product of many rows, each of its results; by its definition where a table has no kernel for it.
template <class Run>
std::vector<std::vector<float>> many(const cpu::KernelTable& table, const cpu::LinearWork& few, int threads,
                                     std::mt19937& random, Run run) {
  const int64_t M = 21 * few.num_rows + 1, K = few.weights[0].columns;
  cpu::ManyWork w{few, 32};
  w.num_rows = M, w.norm_weight = nullptr;
  const SomeMatrix x(M * K, w.dtype, &random), residual(M * w.weights[0].rows, w.dtype, &random);
  w.input = x.bytes.get();
  if (few.residual != nullptr) w.residual = residual.bytes.get();
  std::vector<std::vector<float>> results;
  std::vector<SomeMatrix> outs;
  const int results_of = w.gated ? 1 : w.num_weights;
  for (int i = 0; i < results_of; ++i) {
    outs.emplace_back(M * w.weights[i].rows, w.dtype, nullptr);
    w.out[i] = outs.back().bytes.get();
  }
  if (table.has_many_rows) {
    run(table.many, w, threads);
    for (const SomeMatrix& out : outs) results.push_back(out.values());
    return results;
  }
  std::vector<std::vector<float>> weights;
  for (int i = 0; i < w.num_weights; ++i) {
    const cpu::LinearWeight& weight = w.weights[i];
    const SomeMatrix numbers(weight.rows * K, DType::kFloat32, nullptr);
    if (weight.scheme.packed()) {
      run(table.unpack, cpu::UnpackWork{weight, nullptr, weight.rows, numbers.bytes.get(), DType::kFloat32},
          threads);
    } else {
      for (int64_t j = 0; j < weight.rows * K; ++j) {
        const auto* from = static_cast<const uint8_t*>(weight.data) + j * size_of(weight.dtype);
        write(&numbers.bytes[j * 4], DType::kFloat32, read(from, weight.dtype));
      }
    }
    weights.push_back(numbers.values());
  }
  for (int i = 0; i < results_of; ++i) results.push_back(by_definition(w, i, x, residual, weights));
  return results;
}

// run(stage, work, threads) is check_kernels.cpp's.
template <class Run>
std::vector<std::pair<std::string, std::vector<float>>> linear(const cpu::KernelTable& table,
                                                               const LinearCase& c, DType dtype, int threads,
                                                               Run run) {
  std::mt19937 random(7);
  cpu::LinearWork w{};
  w.num_rows = c.M, w.dtype = dtype, w.eps = 1e-5f, w.num_weights = c.num_weights, w.gated = c.gated;
  const SomeMatrix input(c.M * c.K, dtype, &random), norm(c.K, dtype, &random);
  const SomeMatrix residual(c.M * c.N, dtype, &random);
  w.input = input.bytes.get();
  if (c.norm) w.norm_weight = norm.bytes.get();
  if (c.residual) w.residual = residual.bytes.get();
  std::vector<SomeWeight> weights;
  std::vector<SomeMatrix> outs;
  for (int i = 0; i < c.num_weights; ++i) {
    const int64_t rows = c.gated ? c.N : c.N + 11 * i;
    weights.emplace_back(rows, c.K, c.schemes[i], dtype, random);
    w.weights[i] = weights.back().weight;
    if (c.gated && i > 0) continue;
    outs.emplace_back(c.M * rows, dtype, nullptr);
    w.out[i] = outs.back().bytes.get();
  }
  run(table.linear, w, threads);
  std::vector<std::pair<std::string, std::vector<float>>> results;
  for (size_t i = 0; i < outs.size(); ++i) results.emplace_back("out " + std::to_string(i), outs[i].values());

  const SomeMatrix normed(c.M * c.K, dtype, nullptr);
  const SomeMatrix rstd(c.M, DType::kFloat32, nullptr);
  cpu::NormWork n{c.M,
                  c.K,
                  w.input,
                  norm.bytes.get(),
                  1e-5f,
                  dtype,
                  normed.bytes.get(),
                  reinterpret_cast<float*>(rstd.bytes.get())};
  run(table.norm, n, threads);
  results.emplace_back("normed", normed.values());
  results.emplace_back("1 / rms", rstd.values());
  if (c.schemes[0] != 0) {
    const SomeMatrix numbers(c.N * c.K, dtype, nullptr), chosen(2 * c.K, dtype, nullptr);
    cpu::UnpackWork u{w.weights[0], nullptr, c.N, numbers.bytes.get(), dtype};
    run(table.unpack, u, threads);
    results.emplace_back("numbers", numbers.values());
    const int64_t indices[2] = {c.N - 1, 0};
    u.indices = indices, u.num_rows = 2, u.out = chosen.bytes.get();
    run(table.unpack, u, threads);
    results.emplace_back("chosen rows", chosen.values());
  }
  for (std::vector<float>& values : many(table, w, threads, random, run)) {
    results.emplace_back("of many rows", std::move(values));
  }
  return results;
}

}  // namespace zinit::test
