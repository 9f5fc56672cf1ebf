// The cases: every option that changes which memory a kernel touches, with sizes that divide nothing.
#pragma once
#include <random>
#include <vector>

#include "tensors.h"

namespace zinit::test {

struct Case {
  const char* name;
  int64_t B = 2, Hq = 4, Hkv = 2, T = 63, S = 63, D = 40, P = 10;
  int64_t window_left = -1, window_right = 0;
  int64_t N = 1;         // rows of the prompt table
  bool indexed = false;  // a row for each sequence, -1 for the last one
  bool packed = false;
  bool padded = false;  // a key bias; the last sequence has no key at all
  bool special =
      false;  // NaN in a value, a key, a query and a gradient, each hidden from some: see special.h
  float value_scale = 1.f;
  float softcap = 0.f;
  bool tanh = true;
  bool sinks = false;
  Layout layout = Layout::kTokenMajor;
  int64_t gap = 0;

  // Of decode alone: T new tokens against a cache of S slots.
  int64_t page_size = 0;  // 0: contiguous
  int64_t leftpad = 0;    // of all sequences but the first; hidden keys are NaN
  bool append = true;
  int64_t rotary_dim = 0;
  bool interleaved = false;
  int64_t splits = 1, heads_per_item = 1, query_block = 1;
};

inline const Case kAttentionCases[] = {
    {.name = "one of everything", .B = 1, .Hq = 1, .Hkv = 1, .T = 1, .S = 1, .D = 1, .P = 1},
    {.name = "causal"},
    {.name = "no mask", .T = 65, .S = 129, .D = 64, .window_right = -1},
    {.name = "more queries than keys", .T = 70, .S = 17, .D = 33},
    {.name = "blocks of queries", .B = 1, .Hq = 2, .T = 300, .S = 300, .D = 64},
    {.name = "widest", .B = 1, .Hq = 2, .Hkv = 1, .T = 33, .S = 47, .D = 256, .P = 128},
    {.name = "no prompts", .P = 0},
    {.name = "no keys", .T = 5, .S = 0},
    {.name = "no queries", .T = 0, .S = 5},
    {.name = "window", .T = 111, .S = 111, .window_left = 20, .window_right = 3},
    {.name = "window that some rows leave", .T = 9, .S = 40, .window_left = 2, .window_right = -1},
    {.name = "padding", .B = 3, .padded = true},
    {.name = "packed", .B = 4, .T = 50, .S = 50, .packed = true},
    {.name = "packed, prompt table", .B = 4, .T = 50, .S = 71, .N = 3, .indexed = true, .packed = true},
    {.name = "a prompt row for each", .B = 3, .N = 3, .tanh = false},
    {.name = "prompt table", .B = 3, .P = 17, .N = 5, .indexed = true},
    {.name = "head-major with gaps", .layout = Layout::kHeadMajor, .gap = 3},
    {.name = "NaN, causal", .T = 100, .S = 100, .special = true},
    {.name = "NaN, window, padding",
     .B = 3,
     .T = 70,
     .S = 81,
     .window_left = 9,
     .window_right = 2,
     .padded = true,
     .special = true},
    {.name = "tiny values", .T = 40, .S = 40, .P = 0, .value_scale = 1e-38f},
    {.name = "soft cap, window", .T = 70, .S = 81, .P = 100, .window_left = 30, .softcap = 0.5f},
    {.name = "soft cap, padding", .B = 3, .padded = true, .special = true, .softcap = 2.f},
    {.name = "sinks", .B = 3, .T = 70, .S = 81, .window_left = 9, .padded = true, .sinks = true},
    {.name = "sinks, packed, no prompts", .B = 4, .T = 50, .S = 40, .P = 0, .packed = true, .sinks = true},
};

inline const Case kDecodeCases[] = {
    {.name = "first token", .B = 1, .Hq = 1, .Hkv = 1, .T = 1, .S = 1, .D = 1, .P = 1},
    {.name = "one token", .T = 1, .S = 130, .D = 64},
    {.name = "head-major", .T = 1, .S = 100, .layout = Layout::kHeadMajor, .gap = 3},
    {.name = "splits", .B = 3, .T = 1, .S = 300, .D = 64, .N = 4, .indexed = true, .splits = 5},
    {.name = "many heads to an item", .Hq = 6, .Hkv = 3, .T = 1, .S = 90, .heads_per_item = 2},
    {.name = "chunk", .T = 21, .S = 80, .query_block = 8},
    {.name = "no prompts", .T = 2, .S = 33, .P = 0},
    {.name = "window", .T = 4, .S = 90, .window_left = 11, .N = 2, .query_block = 4},
    {.name = "no mask, nothing new", .T = 3, .S = 50, .window_right = -1, .append = false},
    {.name = "pages", .B = 3, .T = 1, .S = 96, .D = 64, .page_size = 16},
    {.name = "pages, chunk, splits", .T = 9, .S = 70, .page_size = 7, .splits = 3, .query_block = 4},
    {.name = "rotary", .T = 3, .S = 40, .D = 48, .rotary_dim = 48},
    {.name = "rotary, interleaved, pages",
     .T = 1,
     .S = 40,
     .page_size = 8,
     .rotary_dim = 26,
     .interleaved = true},
    {.name = "widest", .B = 1, .Hq = 8, .Hkv = 1, .T = 1, .S = 70, .D = 256, .P = 128, .splits = 2},
    {.name = "NaN, chunk, splits", .T = 9, .S = 70, .special = true, .splits = 3, .query_block = 4},
    {.name = "sinks", .T = 2, .S = 50, .sinks = true, .splits = 3, .heads_per_item = 2},
    {.name = "tiny values", .T = 2, .S = 50, .value_scale = 1e-38f, .splits = 2, .query_block = 2},
    {.name = "hidden slots, splits", .B = 3, .T = 3, .S = 90, .leftpad = 13, .splits = 3, .query_block = 2},
    {.name = "hidden slots, pages", .T = 2, .S = 70, .window_left = 40, .page_size = 7, .leftpad = 9},
    {.name = "soft cap", .T = 5, .S = 70, .softcap = 0.5f, .page_size = 7, .splits = 2, .query_block = 4},
};

inline const DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

inline const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

// The prompt tables of a case, and the parameters that forward, backward and decode share.
class Shared {
 public:
  Shared(const Case& c, DType dtype) : random(7) {
    prompt_key = Tensor(c.N, c.Hkv, c.P, c.D, dtype, Layout::kHeadMajor);
    prompt_value = Tensor(c.N, c.Hkv, c.P, c.D, dtype, Layout::kHeadMajor);
    for (Tensor* tensor : {&prompt_key, &prompt_value}) tensor->randomize(random);
    std::uniform_real_distribution<float> uniform(-1.5f, 1.5f);
    for (int64_t i = 0; i < c.N * c.Hq; ++i) gate.push_back(i % 5 == 3 ? 0.f : uniform(random));
    for (int64_t b = 0; b < c.B; ++b)
      prompt_index.push_back(b == c.B - 1 ? -1 : static_cast<int32_t>((b + 1) % c.N));
    for (int64_t h = 0; h < c.Hq; ++h) sinks.push_back(static_cast<float>(h) - 1.f);
  }

  void describe(const Case& c, AttentionParams& p) {
    p.num_sequences = c.B, p.num_heads_q = c.Hq, p.num_heads_kv = c.Hkv, p.head_dim = c.D;
    p.seqlen_q = c.T, p.seqlen_k = c.S;
    p.window_left = c.window_left, p.window_right = c.window_right;
    p.scale = 1.f / std::sqrt(static_cast<float>(c.D));
    p.softcap = c.softcap, p.tanh_gate = c.tanh;
    p.sinks = {sinks.data(), c.sinks};
    if (c.P == 0) return;
    p.prompt_key = prompt_key.view(), p.prompt_value = prompt_value.view();
    p.prompt_length = c.P, p.prompt_rows = c.N;
    p.prompt_index = {prompt_index.data(), c.indexed};
    p.gate = gate.data(), p.gate_rows = c.N;
  }

  std::mt19937 random;
  Tensor prompt_key, prompt_value;
  std::vector<float> gate, sinks;
  std::vector<int32_t> prompt_index;
};

}  // namespace zinit::test
