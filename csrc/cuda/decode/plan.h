// How a decode call is cut into blocks: pure functions of what the host knows, without torch. The lengths are
// known to the device alone, so the capacity of the cache stands for them, and a captured CUDA graph keeps
// its plan.
#pragma once
#include <algorithm>
#include <cstdint>

namespace zinit::cuda {

constexpr int kMaxSplits = 128;
constexpr int kMaxNewTokens = 16;

// Query rows that share one reading of the keys: the heads of a group times the new tokens.
constexpr int kTensorCoreRows = 16;     // rows of an mma
constexpr int kRowsForTensorCores = 4;  // fewer go to the CUDA cores: most of an mma would be padding
constexpr int kCudaCoreRows = 4;        // or 1; float32 always goes to the CUDA cores

struct DecodePlan {
  bool tensor_cores;
  int rows_per_block;
  int row_blocks;
  int num_splits;
};

// Splits of the keys, so that the blocks cover the chip: the fewest that leave at most a tenth of it idle in
// the last wave, or else those that leave the least idle. Every split costs a partial result, so none is
// shorter than 128 keys or a page.
inline int choose_num_splits(int multiprocessors, int64_t num_sequences, int64_t num_heads_kv,
                             int64_t row_blocks, int64_t capacity, int64_t page_size) {
  constexpr int64_t kBlocksPerMultiprocessor = 2, kKeysWorthASplit = 128;
  const int64_t blocks = std::max<int64_t>(num_sequences * num_heads_kv * row_blocks, 1);
  const int64_t slots = std::max(multiprocessors, 1) * kBlocksPerMultiprocessor;
  const int64_t most = std::clamp<int64_t>(capacity / std::max(kKeysWorthASplit, page_size), 1, kMaxSplits);
  const auto busy = [&](int64_t splits) {
    const int64_t waves = (blocks * splits + slots - 1) / slots;
    return static_cast<double>(blocks * splits) / static_cast<double>(waves * slots);
  };
  int64_t best = 1;
  for (int64_t splits = 1; splits <= most && busy(best) < 0.9; ++splits) {
    if (busy(splits) > busy(best)) best = splits;
  }
  return static_cast<int>(best);
}

// `num_splits` 0 = choose.
inline DecodePlan plan_decode(int multiprocessors, int64_t num_sequences, int64_t num_heads_kv,
                              int64_t query_rows, int64_t capacity, int64_t page_size, bool half_precision,
                              int64_t num_splits) {
  DecodePlan plan;
  plan.tensor_cores = half_precision && query_rows >= kRowsForTensorCores;
  plan.rows_per_block = plan.tensor_cores ? kTensorCoreRows : query_rows == 1 ? 1 : kCudaCoreRows;
  // without a query there is still one block, which appends
  plan.row_blocks = static_cast<int>(std::max<int64_t>((query_rows - 1) / plan.rows_per_block + 1, 1));
  plan.num_splits = static_cast<int>(std::clamp<int64_t>(num_splits, 1, kMaxSplits));
  if (num_splits == 0) {
    plan.num_splits =
        choose_num_splits(multiprocessors, num_sequences, num_heads_kv, plan.row_blocks, capacity, page_size);
  }
  return plan;
}

// Floats between the splits and their combination: acc, m and l of each query row and split.
inline int64_t workspace_floats(const DecodePlan& plan, int64_t num_sequences, int64_t num_heads_q,
                                int64_t seqlen_q, int64_t head_dim) {
  return plan.num_splits == 1 ? 0 : num_sequences * num_heads_q * seqlen_q * plan.num_splits * (head_dim + 2);
}

}  // namespace zinit::cuda
