// The decode kernels without Python, for the sanitizers: every buffer is of exact size, and each case runs in
// float32 on the CUDA cores with whole keys and in bfloat16 as planned with split ones, which must agree.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <vector>

#include "../../csrc/cuda/decode/launch.cuh"
#include "buffer.h"

namespace {

using namespace zinit;

struct Case {
  const char* name;
  int64_t heads_q, heads_kv, tokens;
  std::vector<int32_t> lengths;
  int64_t capacity, page_size, splits;  // page_size 0: contiguous
  bool rotary, absurd;
  int64_t window_left;
};

const std::vector<Case> kCases = {
    {"tensor cores, paged", 8, 2, 2, {0, 17, 40}, 48, 16, 2, true, false, -1},
    {"CUDA cores, contiguous", 2, 2, 1, {0, 40}, 41, 0, 2, true, false, 9},
    {"whole keys", 4, 1, 1, {5}, 32, 16, 1, false, false, -1},
    {"absurd values", 8, 2, 2, {2000000000, -5, 47}, 48, 16, 2, true, true, -1},
};
constexpr int64_t kHeadDim = 64, kPrompts = 3, kTableRows = 2, kRotary = 32;

template <class T>
class Run {
 public:
  explicit Run(const Case& c) : c_(c) {}

  std::vector<float> out(int64_t splits) {
    const auto B = static_cast<int64_t>(c_.lengths.size()), D = kHeadDim;
    const int64_t pages_each = c_.page_size ? c_.capacity / c_.page_size : 1;
    const int64_t page_size = c_.page_size ? c_.page_size : c_.capacity;
    const int64_t pages = B * pages_each + 1;  // page 0, which absurd ids are clamped to, is nobody's
    Buffer<T> query(B * c_.tokens * c_.heads_q * D), result(query.size);
    Buffer<T> new_key(B * c_.tokens * c_.heads_kv * D), new_value(new_key.size);
    Buffer<T> key_cache(pages * page_size * c_.heads_kv * D), value_cache(key_cache.size);
    Buffer<T> prompt_key(kTableRows * kPrompts * c_.heads_kv * D), prompt_value(prompt_key.size);
    Buffer<T> cosine(c_.capacity * kRotary / 2), sine(cosine.size);
    Buffer<float> gate(kTableRows * c_.heads_q), lse(B * c_.heads_q * c_.tokens);
    Buffer<int32_t> lengths(B), table(B * pages_each), index(B);
    query.fill(random_), new_key.fill(random_), new_value.fill(random_), key_cache.fill(random_),
        value_cache.fill(random_), prompt_key.fill(random_);
    prompt_value.fill(random_), cosine.fill(random_), sine.fill(random_), gate.fill(random_);
    for (size_t b = 0; b < lengths.size; ++b) {
      lengths.data[b] = c_.lengths[b];
      index.data[b] =
          c_.absurd ? 1000000 - 2000000 * static_cast<int32_t>(b % 2) : static_cast<int32_t>(b) - 1;
    }
    for (size_t i = 0; i < table.size; ++i) {
      table.data[i] = static_cast<int32_t>(c_.absurd && i % 2 ? 2000000000 : table.size - i);
    }

    DecodeParams p{};
    constexpr DType kType = sizeof(T) == 4 ? DType::kFloat32 : DType::kBFloat16;
    const auto view = [&](Buffer<T>& of, int64_t tokens, int64_t heads) {
      return View{of.data, tokens * heads * D, D, heads * D, kType, true};
    };
    p.num_sequences = B, p.num_heads_q = c_.heads_q, p.num_heads_kv = c_.heads_kv, p.head_dim = D;
    p.seqlen_q = p.seqlen_new = c_.tokens, p.seqlen_k = c_.capacity;
    p.window_left = c_.window_left, p.window_right = 0, p.scale = 0.125f;
    p.query = view(query, c_.tokens, c_.heads_q), p.out = view(result, c_.tokens, c_.heads_q);
    p.new_key = view(new_key, c_.tokens, c_.heads_kv), p.new_value = view(new_value, c_.tokens, c_.heads_kv);
    p.key_cache = view(key_cache, page_size, c_.heads_kv),
    p.value_cache = view(value_cache, page_size, c_.heads_kv);
    p.prompt_key = view(prompt_key, kPrompts, c_.heads_kv),
    p.prompt_value = view(prompt_value, kPrompts, c_.heads_kv);
    p.prompt_length = kPrompts, p.prompt_rows = p.gate_rows = kTableRows, p.prompt_index = {index.data, true};
    p.gate = gate.data, p.tanh_gate = true, p.lse = lse.data, p.cache_seqlens = {lengths.data, true};
    if (c_.page_size) {
      p.block_table = {table.data, true}, p.block_table_stride = pages_each, p.page_size = page_size,
      p.num_pages = pages;
    }
    if (c_.rotary) {
      p.rotary = {.cos = cosine.data,
                  .sin = sine.data,
                  .stride = kRotary / 2,
                  .positions = c_.capacity,
                  .dim = kRotary,
                  .dtype = kType,
                  .interleaved = false,
                  .by_token = true,
                  .given = true};
    }
    const auto plan = cuda::plan_decode(4, B, c_.heads_kv, c_.tokens * c_.heads_q / c_.heads_kv, c_.capacity,
                                        p.page_size, sizeof(T) == 2, splits);
    Buffer<float> workspace(cuda::workspace_floats(plan, B, c_.heads_q, c_.tokens, D));
    const auto work = cuda::decode_work(p, plan, workspace.data);
    cuda::launch_attention<T, kHeadDim>(work, plan, nullptr);
    cuda::launch_combine<T>(work, nullptr);

    std::vector<float> floats;
    for (size_t i = 0; i < result.size; ++i) floats.push_back(cuda::to_float(result.data[i]));
    return floats;
  }

 private:
  const Case& c_;
  std::minstd_rand random_{7};
};

bool agrees(const Case& c) {
  const auto expected = Run<float>(c).out(1), found = Run<cuda::bf16>(c).out(c.splits);
  float worst = 0.f;
  for (size_t i = 0; i < found.size(); ++i) {
    const float error = std::fabs(found[i] - expected[i]);
    if (!(error <= worst)) worst = error;
  }
  const bool good = worst < 0.03f;
  std::printf("%s: %s, error %.1e\n", good ? "ok" : "WRONG", c.name, static_cast<double>(worst));
  return good;
}

}  // namespace

int main() {
  int wrong = 0;
  try {
    for (const Case& c : kCases) wrong += !agrees(c);
  } catch (const std::exception& error) {
    std::printf("ERROR: %s\n", error.what());
    wrong = 1;
  }
  return wrong;
}
