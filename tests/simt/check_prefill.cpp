// The prefill and prompt kernels without Python, for the sanitizers: every buffer is of exact size. Fresh
// keys are compared with the formula, a cache and the prompt branch alone with fresh keys; absurd values must
// stay inside.
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "../../csrc/cuda/prefill/launch.cuh"
#include "../../csrc/cuda/prefill/prefill.h"
#include "../../csrc/cuda/prompt/launch.cuh"
#include "buffer.h"

namespace {

using namespace zinit;
using cuda::bf16;

constexpr int64_t B = 2, T = 70, kHeads = 2, D = 64, P = 3, kRows = 2, kPage = 16, kPagesEach = 5;
constexpr int64_t kWindow = 50, kPages = B * kPagesEach + 1;
constexpr float kScale = 0.125f;

struct Problem {  // one key head
  Buffer<bf16> query{B * T * kHeads * D}, key{B * T * D}, value{B * T * D};
  Buffer<bf16> prompt_key{kRows * P * D}, prompt_value{kRows * P * D};
  Buffer<float> gate{kRows * kHeads};
  Buffer<int32_t> prompt_index{B};

  Problem() {
    std::minstd_rand random(7);
    query.fill(random), key.fill(random), value.fill(random), prompt_key.fill(random);
    prompt_value.fill(random), gate.fill(random);
    prompt_index.data[0] = -1, prompt_index.data[1] = 1;
  }

  static View view(const Buffer<bf16>& of, int64_t tokens, int64_t heads) {
    return {of.data, tokens * heads * D, D, heads * D, DType::kBFloat16, true};
  }
  void set_shared(AttentionParams& p, bool prompted) const {
    p.num_sequences = B, p.num_heads_q = kHeads, p.num_heads_kv = 1, p.head_dim = D, p.seqlen_q = T;
    p.seqlen_k = T, p.window_left = kWindow, p.window_right = 0, p.scale = kScale, p.tanh_gate = true;
    if (!prompted) return;
    p.prompt_key = view(prompt_key, P, 1), p.prompt_value = view(prompt_value, P, 1);
    p.prompt_length = P, p.prompt_rows = p.gate_rows = kRows, p.gate = gate.data;
    p.prompt_index = {prompt_index.data, true};
  }
  PrefillParams fresh(bool prompted, Buffer<bf16>& out, Buffer<float>& lse) const {
    PrefillParams p{};
    set_shared(p, prompted);
    p.query = view(query, T, kHeads), p.out = view(out, T, kHeads), p.lse = lse.data;
    p.key_cache = view(key, T, 1), p.value_cache = view(value, T, 1), p.total_q = p.total_k = T;
    return p;
  }
  double out_of(int64_t b, int64_t t, int64_t head, int64_t d) const;
};

void launch(const PrefillParams& p) {
  const auto work = cuda::prefill_work(p);
  cuda::launch_prefill_of<bf16, D>(work, nullptr);
}

double dot(const bf16* a, const bf16* b) {
  double sum = 0;
  for (int64_t d = 0; d < D; ++d) sum += cuda::to_float(a[d]) * cuda::to_float(b[d]);
  return sum;
}

// The formula: dimension d of a softmax over keys first to last.
double attend(const bf16* query, const bf16* keys, const bf16* values, int64_t first, int64_t last,
              int64_t d) {
  double sum = 0, out = 0;
  for (int64_t j = first; j <= last; ++j) {
    const double weight = std::exp(static_cast<double>(kScale) * dot(query, keys + j * D));
    sum += weight, out += weight * cuda::to_float(values[j * D + d]);
  }
  return out / sum;
}

double Problem::out_of(int64_t b, int64_t t, int64_t head, int64_t d) const {
  const bf16* q = query.data + ((b * T + t) * kHeads + head) * D;
  const double tokens =
      attend(q, key.data + b * T * D, value.data + b * T * D, std::max<int64_t>(t - kWindow, 0), t, d);
  const int64_t row = prompt_index.data[b], table = row * P * D;
  if (row < 0) return tokens;
  const double prompts = attend(q, prompt_key.data + table, prompt_value.data + table, 0, P - 1, d);
  return tokens + std::tanh(static_cast<double>(gate.data[row * kHeads + head])) * prompts;
}

int report(const char* name, double worst, double allowed) {
  const bool good = worst <= allowed;
  std::printf("%s: %s, error %.1e\n", good ? "ok" : "WRONG", name, worst);
  return !good;
}

double difference(const Buffer<bf16>& a, const Buffer<bf16>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size; ++i) {
    const double error = std::fabs(cuda::to_float(a.data[i]) - cuda::to_float(b.data[i]));
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

int check_fresh(const Problem& problem, Buffer<bf16>& out, Buffer<float>& lse) {
  launch(problem.fresh(true, out, lse));
  double worst = 0;
  for (int64_t i = 0; i < B * T * kHeads * D; i += 7) {
    const double expected = problem.out_of(i / D / kHeads / T, i / D / kHeads % T, i / D % kHeads, i % D);
    const double error = std::fabs(cuda::to_float(out.data[i]) - expected);
    if (!(error <= worst)) worst = error;
  }
  return report("fresh keys", worst, 0.02);
}

int check_prompt_branch(const Problem& problem, const Buffer<bf16>& expected) {
  Buffer<bf16> out(B * T * kHeads * D);
  Buffer<float> lse(B * kHeads * T);
  launch(problem.fresh(false, out, lse));
  PromptParams p{};
  problem.set_shared(p, true);
  p.query = Problem::view(problem.query, T, kHeads), p.out = Problem::view(out, T, kHeads), p.total_q = T;
  cuda::launch_prompt_of<bf16, D>(cuda::prompt_work(p), nullptr);
  return report("the prompt branch alone", difference(out, expected), 0.02);
}

int check_cache(Problem& problem, const Buffer<bf16>& expected, bool absurd) {
  Buffer<bf16> out(B * T * kHeads * D), key_cache(kPages * kPage * D), value_cache(kPages * kPage * D);
  Buffer<float> lse(B * kHeads * T);
  Buffer<int32_t> lengths(B), table(B * kPagesEach);
  std::minstd_rand random(5);
  key_cache.fill(random), value_cache.fill(random);
  for (size_t b = 0; b < lengths.size; ++b) lengths.data[b] = absurd ? (b ? -7 : 2000000000) : 0;
  for (size_t i = 0; i < table.size; ++i) {
    table.data[i] =
        static_cast<int32_t>(absurd && i % 2 ? 2000000000 : table.size - i);  // page 0 is nobody's
  }
  PrefillParams p = problem.fresh(true, out, lse);
  if (absurd) problem.prompt_index.data[0] = 1000000;
  p.new_key = p.key_cache, p.new_value = p.value_cache, p.seqlen_new = T;
  p.key_cache = Problem::view(key_cache, kPage, 1), p.value_cache = Problem::view(value_cache, kPage, 1);
  p.cache_seqlens = {lengths.data, true}, p.block_table = {table.data, true},
  p.block_table_stride = kPagesEach;
  p.page_size = kPage, p.num_pages = kPages, p.seqlen_k = kPage * kPagesEach;
  launch(p);
  return report(absurd ? "absurd lengths and pages" : "a cache", absurd ? 0 : difference(out, expected), 0);
}

int check_absurd_packing(const Problem& problem) {
  Buffer<bf16> out(B * T * kHeads * D);
  Buffer<float> lse(B * kHeads * T);
  Buffer<int32_t> cumulative(4);
  const int32_t absurd[] = {-5, 100, 2147483647, -2147483647};
  for (size_t i = 0; i < 4; ++i) cumulative.data[i] = absurd[i];
  PrefillParams p = problem.fresh(false, out, lse);
  p.num_sequences = 3, p.seqlen_q = p.seqlen_k = p.total_q = p.total_k = B * T;
  p.cu_seqlens_q = p.cu_seqlens_k = {cumulative.data, true};
  launch(p);
  return report("absurd packed lengths", 0, 0);
}

}  // namespace

int main() {
  try {
    Problem problem;
    Buffer<bf16> out(B * T * kHeads * D);
    Buffer<float> lse(B * kHeads * T);
    int wrong = check_fresh(problem, out, lse);
    wrong += check_prompt_branch(problem, out);
    wrong += check_cache(problem, out, false);
    wrong += check_cache(problem, out, true);
    return wrong + check_absurd_packing(problem);
  } catch (const std::exception& error) {
    std::printf("ERROR: %s\n", error.what());
    return 1;
  }
}
