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
#include "../../csrc/cuda/prompt/launch.cuh"
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
    if (std::max(p->seqlen_q, p->seqlen_new) > zinit::cuda::kMaxNewTokens) {
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

int64_t simt_sizeof_prompt_work() { return sizeof(zinit::cuda::PromptWork); }

int64_t simt_sizeof_prefill_work() { return sizeof(zinit::cuda::PrefillWork); }

int simt_prefill(const zinit::PrefillParams* p) {
  return guarded([&] { zinit::cuda::prefill(*p, nullptr); });
}

int simt_prompt(const zinit::PromptParams* p) {
  return guarded([&] { zinit::cuda::add_prompt_branch(*p, nullptr); });
}

// As `simt_plan`, for head_dim 64. `numbers`: blocks along the queries and along the new tokens, bytes of
// shared memory.
void simt_prefill_plan(const zinit::PrefillParams* p, zinit::cuda::PrefillWork* work, int64_t* numbers) {
  using Shape = zinit::cuda::PrefillShape<64>;
  *work = zinit::cuda::prefill_work(*p);
  numbers[0] = (p->seqlen_q + Shape::kQueries - 1) / Shape::kQueries;
  numbers[1] = (p->seqlen_new + zinit::cuda::kTokensPerBlock - 1) / zinit::cuda::kTokensPerBlock;
  numbers[2] = zinit::cuda::PrefillShared<zinit::cuda::bf16, Shape>::kBytes;
}

void simt_prompt_plan(const zinit::PromptParams* p, zinit::cuda::PromptWork* work, int64_t* numbers) {
  using Shape = zinit::cuda::PromptShape<64>;
  *work = zinit::cuda::prompt_work(*p);
  numbers[0] = (p->seqlen_q + Shape::kQueries - 1) / Shape::kQueries;
  numbers[1] = zinit::cuda::PromptShared<zinit::cuda::bf16, Shape>::kBytes;
}

void simt_tile_bytes(int head_dim, int64_t* numbers) {
  const auto set = [&]<int D>() {
    if (head_dim != D) return;
    using namespace zinit::cuda;
    numbers[0] = PrefillShared<bf16, PrefillShape<D>>::kBytes;
    numbers[1] = PromptShared<bf16, PromptShape<D>>::kBytes;
  };
  set.operator()<64>(), set.operator()<80>(), set.operator()<96>();
  set.operator()<128>(), set.operator()<256>();
}

int64_t simt_bank_conflicts() { return static_cast<int64_t>(simt::bank_conflicts()); }

int simt_selftest(const char* name) {
  return guarded([&] { selftest(name); });
}

}  // extern "C"
