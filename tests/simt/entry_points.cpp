// C entry points for Python: the decode launcher as the bindings call it, and the emulator's own tests.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>

#include "../../csrc/cuda/decode/decode.h"
#include "selftest.h"

namespace {

char g_error[4096];

// Of exact size and full of NaN.
std::unique_ptr<float, void (*)(void*)> nan_floats(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * 4 + 15) / 16 * 16;
  void* memory = bytes ? std::aligned_alloc(16, bytes) : nullptr;
  if (memory) std::memset(memory, 0xff, bytes);
  return {static_cast<float*>(memory), std::free};
}

template <class F>
int guarded(F run) {
  try {
    run();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(g_error, sizeof g_error, "%s", error.what());
    return 1;
  }
}

}  // namespace

extern "C" {

const char* simt_error() { return g_error; }

int64_t simt_sizeof_decode_params() { return sizeof(zinit::DecodeParams); }

int simt_decode(const zinit::DecodeParams* p, int multiprocessors) {
  return guarded([&] {
    const bool half_precision = p->query.dtype != zinit::DType::kFloat32;
    const auto plan = zinit::cuda::plan_decode(multiprocessors, p->num_sequences, p->num_heads_kv,
                                               p->seqlen_q * (p->num_heads_q / p->num_heads_kv), p->seqlen_k,
                                               p->page_size, half_precision, p->num_splits);
    const auto workspace = nan_floats(
        zinit::cuda::workspace_floats(plan, p->num_sequences, p->num_heads_q, p->seqlen_q, p->head_dim));
    zinit::cuda::decode(*p, plan, workspace.get(), nullptr);
  });
}

int simt_choose_num_splits(int multiprocessors, int64_t num_sequences, int64_t num_heads_kv,
                           int64_t row_blocks, int64_t capacity, int64_t page_size) {
  return zinit::cuda::choose_num_splits(multiprocessors, num_sequences, num_heads_kv, row_blocks, capacity,
                                        page_size);
}

int simt_selftest(const char* name) {
  return guarded([&] { selftest(name); });
}

}  // extern "C"
