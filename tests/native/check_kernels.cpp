// Runs every stage of the CPU kernels on raw buffers, for each instruction set that this processor has, and
// compares: with the generic kernels within rounding, and four threads with one thread bit for bit. Built
// under the sanitizers, which do the finding; scratch, outputs and partial results start as NaN.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <utility>

#include "cases.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "linear_cases.h"
#include "row_cases.h"

namespace zinit::test {
namespace {

using cpu::KernelTable;

std::vector<const KernelTable*> tables() {
  std::vector<const KernelTable*> usable = {&cpu::kGenericKernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(ZINIT_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    usable.push_back(&cpu::kAvx2Kernels);
  }
#endif
#if defined(ZINIT_HAVE_AVX512)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) usable.push_back(&cpu::kAvx512Kernels);
#if defined(ZINIT_HAVE_AVX512_BF16)
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    usable.push_back(&cpu::kAvx512Bf16Kernels);
#endif
#endif
#endif
  return usable;
}

struct Result {
  std::string name;
  std::vector<float> values;
};

// Threads take items from a counter, each with a scratch of exactly the size asked for.
template <class Stage, class Params>
void run(const Stage& stage, const Params& params, int num_threads) {
  const int64_t items = stage.items(params);
  const size_t bytes = static_cast<size_t>(stage.scratch_bytes(params));
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    void* scratch = nullptr;
    if (posix_memalign(&scratch, 64, bytes) != 0) std::abort();
    std::memset(scratch, 0xff, bytes);
    if constexpr (requires { stage.prepare; }) stage.prepare(params, scratch);
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      stage.run(params, item, item + 1, scratch);
    }
    std::free(scratch);
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

std::vector<int32_t> boundaries(int64_t sequences, int64_t longest, int64_t step) {
  std::vector<int32_t> cu = {0};
  for (int64_t b = 0; b < sequences; ++b) {
    cu.push_back(cu.back() + static_cast<int32_t>(std::max<int64_t>(0, longest - step * b)));
  }
  return cu;
}

// Forward, then backward with the gradients that `needs` asks for (bit i: query, key, value, prompt key,
// prompt value, gate, sinks) and with the key heads' work cut into `splits`.
std::vector<Result> attention(const KernelTable& table, const Case& c, DType dtype, int threads, int needs,
                              int64_t splits) {
  Shared shared(c, dtype);
  const std::vector<int32_t> cu_q = boundaries(c.B, c.T, 25), cu_k = boundaries(c.B, c.S, 17);
  const int64_t batch = c.packed ? 1 : c.B, rows = c.packed ? cu_q.back() : c.T,
                keys = c.packed ? cu_k.back() : c.S;
  Tensor query(batch, c.Hq, rows, c.D, dtype, c.layout, c.gap),
      key(batch, c.Hkv, keys, c.D, dtype, c.layout, c.gap);
  Tensor value(batch, c.Hkv, keys, c.D, dtype, c.layout, c.gap),
      out(batch, c.Hq, rows, c.D, dtype, c.layout, c.gap);
  for (Tensor* tensor : {&query, &key}) tensor->randomize(shared.random);
  value.randomize(shared.random, c.value_scale);
  std::vector<float> lse(batch * c.Hq * rows, kNaN), bias(c.padded ? c.B * c.S : 0);
  for (size_t i = 0; i < bias.size(); ++i) {
    const int64_t b = i / c.S, j = i % c.S, length = b == c.B - 1 ? 0 : c.S - 9 * b - 1;
    bias[i] = j < length ? 0.1f * (i % 7) : -INFINITY;
    if (j < length) continue;
    for (int64_t h = 0; h < c.Hkv; ++h) {
      for (int64_t d = 0; d < c.D; ++d)
        write(key.at(b, h, j, d), dtype, kNaN), write(value.at(b, h, j, d), dtype, kNaN);
    }
  }

  Tensor grad_out(batch, c.Hq, rows, c.D, dtype, c.layout, c.gap);
  grad_out.randomize(shared.random);
  if (c.special) {
    write(value.at(0, 0, keys - 9, c.D - 1), dtype, kNaN), write(key.at(0, 1, keys - 13, 0), dtype, INFINITY);
    write(query.at(0, 1, rows / 2, 1), dtype, kNaN), write(grad_out.at(0, 2, rows / 3, 2), dtype, kNaN);
  }

  const auto describe = [&](auto& p) {
    shared.describe(c, p);
    p.cu_seqlens_q = {cu_q.data(), c.packed}, p.cu_seqlens_k = {cu_k.data(), c.packed};
    p.key_bias = {bias.data(), c.padded};
    p.query = query.view(), p.key = key.view(), p.value = value.view(), p.out = out.view();
  };
  ForwardParams forward{};
  describe(forward);
  forward.lse = lse.data();
  run(table.forward, forward, threads);

  cpu::BackwardWork p{};
  describe(p);
  std::vector<float> grad_lse(lse.size());
  for (size_t i = 0; i < lse.size(); ++i) grad_lse[i] = std::isinf(lse[i]) ? 0.f : 0.05f * (i % 11);
  p.grad_out = grad_out.view(), p.lse = lse.data(), p.grad_lse = {grad_lse.data(), c.gap > 0};
  Tensor grads[] = {
      Tensor(batch, c.Hq, rows, c.D, dtype, Layout::kTokenMajor),
      Tensor(batch, c.Hkv, keys, c.D, dtype, Layout::kTokenMajor),
      Tensor(batch, c.Hkv, keys, c.D, dtype, Layout::kTokenMajor),
      Tensor(c.N, c.Hkv, c.P, c.D, dtype, Layout::kHeadMajor),
      Tensor(c.N, c.Hkv, c.P, c.D, dtype, Layout::kHeadMajor),
  };
  View* const views[] = {&p.grad_query, &p.grad_key, &p.grad_value, &p.grad_prompt_key, &p.grad_prompt_value};
  if (c.P == 0) needs &= 0b1000111;
  for (int i = 0; i < 5; ++i) {
    if (needs >> i & 1) *views[i] = grads[i].view();
  }
  std::vector<float> grad_gate(c.N * c.Hq, kNaN);
  if (needs >> 5 & 1) p.grad_gate = {grad_gate.data(), true};
  std::vector<float> grad_sinks(c.Hq, kNaN);
  p.grad_sinks = {grad_sinks.data(), c.sinks && (needs >> 6 & 1) != 0};

  p.block_queries = 64;
  p.blocks = (c.T + p.block_queries - 1) / p.block_queries;
  p.splits = std::clamp<int64_t>(c.Hq / c.Hkv * p.blocks, 1, splits);
  p.in_turn = p.splits == 1 || threads == 1;  // the same bits either way
  p.padded_dim = (c.D + 15) / 16 * 16;
  const cpu::BackwardWorkspace workspace(p);
  // one block for each part, so that an access past its end is seen
  std::vector<float> key_partials(workspace.key_floats, kNaN);
  std::vector<float> prompt_partials(workspace.prompt_floats, kNaN);
  std::vector<float> gate_partials(workspace.gate_floats, kNaN);
  p.key_partials = key_partials.data();
  std::vector<float> sink_partials(workspace.sink_floats, kNaN);
  p.prompt_partials = prompt_partials.data(), p.gate_partials = gate_partials.data();
  p.sink_partials = sink_partials.data();
  run(table.backward, p, threads);
  run(table.backward_reduce, p, threads);

  std::vector<Result> results = {{"out", out.values()}, {"lse", lse}};
  const char* const names[] = {"grad_query", "grad_key", "grad_value", "grad_prompt_key",
                               "grad_prompt_value"};
  for (int i = 0; i < 5; ++i) {
    if (needs >> i & 1) results.push_back({names[i], grads[i].values()});
  }
  if (needs >> 5 & 1) results.push_back({"grad_gate", grad_gate});
  if (p.grad_sinks.given) results.push_back({"grad_sinks", grad_sinks});
  return results;
}

std::vector<Result> decode(const KernelTable& table, const Case& c, DType dtype, int threads) {
  Shared shared(c, dtype);
  const bool paged = c.page_size > 0;
  const int64_t max_pages = paged ? c.S / c.page_size : 0, pages = c.B * max_pages + 2;
  const int64_t batch = paged ? pages : c.B, slots = paged ? c.page_size : c.S;
  Tensor query(c.B, c.Hq, c.T, c.D, dtype, c.layout, c.gap),
      out(c.B, c.Hq, c.T, c.D, dtype, Layout::kTokenMajor);
  Tensor new_key(c.B, c.Hkv, c.T, c.D, dtype, c.layout, c.gap),
      new_value(c.B, c.Hkv, c.T, c.D, dtype, c.layout);
  Tensor key_cache(batch, c.Hkv, slots, c.D, dtype, c.layout, c.gap);
  Tensor value_cache(batch, c.Hkv, slots, c.D, dtype, c.layout, c.gap);
  for (Tensor* tensor : {&query, &new_key}) tensor->randomize(shared.random);
  new_value.randomize(shared.random, c.value_scale);
  if (c.special) write(new_value.at(0, 0, c.T - 2, 3), dtype, INFINITY);
  std::vector<float> lse(c.B * c.Hq * c.T, kNaN), cosine, sine;
  for (int64_t i = 0; i < c.S * c.rotary_dim / 2; ++i) {
    cosine.push_back(std::cos(0.3f * i)), sine.push_back(std::sin(0.3f * i));
  }

  // Ragged lengths, the last sequence fills its cache. Slots and pages that hold nothing stay NaN, dead
  // entries of the block table are absurd.
  const int64_t capacity = (paged ? max_pages * c.page_size : c.S), appended = c.append ? c.T : 0;
  std::vector<int32_t> seqlens, block_table(c.B * max_pages, 2147480000);
  std::normal_distribution<float> normal;
  for (int64_t b = 0; b < c.B; ++b) {
    seqlens.push_back(static_cast<int32_t>((capacity - appended) * (b + 1) / c.B));
    const int64_t total = seqlens[b] + appended;
    for (int64_t i = 0; paged && i * c.page_size < total; ++i) {
      block_table[b * max_pages + i] = static_cast<int32_t>(pages - 2 - (b * max_pages + i));
    }
    for (int64_t h = 0; h < c.Hkv; ++h) {
      for (int64_t t = b == 0 ? 0 : c.leftpad; t < seqlens[b]; ++t) {
        const int64_t row = paged ? block_table[b * max_pages + t / c.page_size] : b;
        const int64_t slot = paged ? t % c.page_size : t;
        for (int64_t d = 0; d < c.D; ++d) {
          write(key_cache.at(row, h, slot, d), dtype, normal(shared.random));
          write(value_cache.at(row, h, slot, d), dtype, c.value_scale * normal(shared.random));
        }
      }
    }
  }

  cpu::DecodeWork w{};
  shared.describe(c, w);
  w.seqlen_k = capacity;
  w.query = query.view(), w.out = out.view(), w.lse = lse.data();
  w.key_cache = key_cache.view(), w.value_cache = value_cache.view();
  if (c.append) w.new_key = new_key.view(), w.new_value = new_value.view(), w.seqlen_new = c.T;
  w.cache_seqlens = {seqlens.data(), true};
  std::vector<int32_t> leftpad(c.B, static_cast<int32_t>(c.leftpad));
  leftpad[0] = 0;
  w.cache_leftpad = {leftpad.data(), c.leftpad > 0};
  if (paged) {
    w.block_table = {block_table.data(), true}, w.block_table_stride = max_pages;
    w.page_size = c.page_size, w.num_pages = pages;
  }
  if (c.rotary_dim > 0) {
    w.rotary = {.cos = cosine.data(),
                .sin = sine.data(),
                .stride = c.rotary_dim / 2,
                .positions = c.S,
                .dim = c.rotary_dim,
                .dtype = DType::kFloat32,
                .interleaved = c.interleaved,
                .by_token = false,
                .given = true};
  }
  w.query_block = c.query_block, w.query_blocks = (c.T + c.query_block - 1) / c.query_block;
  w.heads_per_item = c.heads_per_item, w.head_blocks = (c.Hkv + c.heads_per_item - 1) / c.heads_per_item;
  w.splits = c.splits;
  std::vector<float> partials(cpu::decode_partial_floats(w), kNaN);
  w.partials = partials.data();
  run(table.decode_append, w, threads);
  run(table.decode_attend, w, threads);
  run(table.decode_combine, w, threads);
  return {{"out", out.values()},
          {"lse", lse},
          {"key_cache", key_cache.values()},
          {"value_cache", value_cache.values()}};
}

// The largest error over the largest expected value; infinite where one is finite and the other is not.
double distance(const std::vector<float>& actual, const std::vector<float>& expected) {
  double error = 0, scale = 1e-2;
  for (size_t i = 0; i < expected.size(); ++i) {
    const float a = actual[i], e = expected[i];
    if (std::isfinite(a) != std::isfinite(e)) return INFINITY;
    if (!std::isfinite(e)) continue;
    error = std::max(error, std::abs(static_cast<double>(a) - e));
    scale = std::max(scale, std::abs(static_cast<double>(e)));
  }
  return error / scale;
}

// Which of two NaN a sum of both has is up to the compiler, so all NaN are the same.
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  const auto same = [](float x, float y) {
    return std::bit_cast<uint32_t>(x) == std::bit_cast<uint32_t>(y) || (std::isnan(x) && std::isnan(y));
  };
  return std::ranges::equal(a, b, same);
}

int failures = 0, checks = 0;

void expect(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

void check(const std::string& name, DType dtype, bool special,
           const std::function<std::vector<Result>(const KernelTable&, int)>& compute) {
  // Units of rounding that two orders of summation may differ by, well below what a wrong row or column would
  // cause.
  const double tolerance = dtype == DType::kFloat32 ? 1e-4 : dtype == DType::kFloat16 ? 4e-3 : 3e-2;
  std::vector<Result> expected;
  for (const KernelTable* table : tables()) {
    const std::string what = std::string(table->name) + ", " + name_of(dtype) + ", " + name;
    const std::vector<Result> one = compute(*table, 1), four = compute(*table, 4);
    if (expected.empty()) expected = one;
    for (size_t i = 0; i < one.size(); ++i) {
      const double apart = distance(one[i].values, expected[i].values);
      expect(apart <= tolerance,
             what + ": " + one[i].name + " differs from the generic kernels' by " + std::to_string(apart));
      expect(same_bits(one[i].values, four[i].values),
             what + ": " + one[i].name + " depends on the number of threads");
      const bool cache = one[i].name.ends_with("cache"), lse = one[i].name == "lse";
      const bool sound = std::ranges::none_of(
          one[i].values, [&](float x) { return std::isnan(x) || (!lse && std::isinf(x)); });
      expect(cache || special || sound, what + ": " + one[i].name + " has elements that are not finite");
    }
  }
}

int main() {
  for (const DType dtype : kDTypes) {
    for (const Case& c : kAttentionCases) {
      for (const auto& [needs, splits] :
           {std::pair{127, 3}, {127, 1}, {0b111000, 2}, {0b000001, 2}, {0b100110, 2}}) {
        // Which gradients are wanted, and how the work is cut, is the same code for every dtype.
        if (dtype != DType::kFloat32 && splits != 3) continue;
        const std::string name = std::string(c.name) + ", gradients " + std::to_string(needs) + ", splits " +
                                 std::to_string(splits);
        check(name, dtype, c.special, [&](const KernelTable& table, int threads) {
          return attention(table, c, dtype, threads, needs, splits);
        });
      }
    }
    for (const Case& c : kDecodeCases) {
      check(std::string("decode, ") + c.name, dtype, c.special,
            [&](const KernelTable& table, int threads) { return decode(table, c, dtype, threads); });
    }
    const auto check_all = [&](const std::string& kind, const auto& cases, const auto& results_of) {
      for (const auto& c : cases) {
        check(kind + c.name, dtype, false, [&](const KernelTable& table, int threads) {
          std::vector<Result> results;
          const auto on_threads = [](const auto& stage, const auto& work, int n) { run(stage, work, n); };
          for (auto& [name, values] : results_of(table, c, dtype, threads, on_threads)) {
            results.push_back({name, std::move(values)});
          }
          return results;
        });
      }
    };
    check_all("linear, ", kLinearCases, [](const auto&... given) { return linear(given...); });
    check_all("rows, ", kRowCases, [](const auto&... given) { return rows(given...); });
  }
  std::string names;
  for (const KernelTable* table : tables()) names += std::string(names.empty() ? "" : ", ") + table->name;
  std::printf("%d checks of %s: %d failed\n", checks, names.c_str(), failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace zinit::test

int main() { return zinit::test::main(); }
