// C entry points for Python: the decode launcher as the bindings call it, and the emulator's own tests.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>

#include "../../csrc/cuda/decode/decode.h"
#include "../../csrc/cuda/decode/launch.cuh"
#include "../../csrc/cuda/prefill/launch.cuh"
#include "../../csrc/cuda/prefill/prefill.h"
#include "../../csrc/cuda/prompt/prompt.h"
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

zinit::cuda::DecodePlan plan_of(const zinit::DecodeParams& p, int multiprocessors) {
  return zinit::cuda::plan_decode(multiprocessors, p.num_sequences, p.num_heads_kv,
                                  p.seqlen_q * (p.num_heads_q / p.num_heads_kv), p.seqlen_k, p.page_size,
                                  p.query.dtype != zinit::DType::kFloat32, p.num_splits);
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

int64_t simt_sizeof_decode_work() { return sizeof(zinit::cuda::DecodeWork); }

int simt_decode(const zinit::DecodeParams* p, int multiprocessors) {
  return guarded([&] {
    if (std::max(p->seqlen_q, p->seqlen_new) > zinit::cuda::kNewTokensAtMost) {
      return zinit::cuda::prefill(zinit::cuda::prefill_params(*p), nullptr);
    }
    const auto plan = plan_of(*p, multiprocessors);
    const auto workspace = nan_floats(
        zinit::cuda::workspace_floats(plan, p->num_sequences, p->num_heads_q, p->seqlen_q, p->head_dim));
    zinit::cuda::decode(*p, plan, workspace.get(), nullptr);
  });
}

// What `simt_decode` would launch, for whoever runs the kernels in another way. `numbers`: rows per block,
// row blocks, splits, whether on tensor cores, bytes of shared memory of the attention and of the
// combination.
void simt_plan(const zinit::DecodeParams* p, int multiprocessors, float* workspace,
               zinit::cuda::DecodeWork* work, int64_t* numbers) {
  const auto plan = plan_of(*p, multiprocessors);
  *work = zinit::cuda::decode_work(*p, plan, workspace);
  numbers[0] = plan.rows_per_block, numbers[1] = plan.row_blocks, numbers[2] = plan.num_splits;
  numbers[3] = plan.tensor_cores;
  numbers[4] = zinit::cuda::attention_shared(*work, plan).bytes;
  numbers[5] = zinit::cuda::combine_shared_bytes(*work);
}

int simt_shared_bytes(int rows, int head_dim, int element_bytes, int prompt_length, int new_tokens) {
  return zinit::cuda::SharedLayout(rows, head_dim, element_bytes, prompt_length, new_tokens).bytes;
}

int64_t simt_sizeof_prefill_params() { return sizeof(zinit::PrefillParams); }

int64_t simt_sizeof_prompt_params() { return sizeof(zinit::PromptParams); }

int64_t simt_sizeof_prefill_work() { return sizeof(zinit::cuda::PrefillWork); }

int simt_prefill(const zinit::PrefillParams* p) {
  return guarded([&] { zinit::cuda::prefill(*p, nullptr); });
}

int simt_prompt(const zinit::PromptParams* p) {
  return guarded([&] { zinit::cuda::add_prompt_branch(*p, nullptr); });
}

void simt_prefill_work(const zinit::PrefillParams* p, zinit::cuda::PrefillWork* work) {
  *work = zinit::cuda::prefill_work(*p);
}

int64_t simt_bank_conflicts() { return static_cast<int64_t>(simt::bank_conflicts()); }

int simt_selftest(const char* name) {
  return guarded([&] { selftest(name); });
}

}  // extern "C"
