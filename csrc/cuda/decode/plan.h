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

// Splits of the keys: those that end soonest, in rounds. A block takes 64 keys in a round, and the blocks run in
// waves of two on each multiprocessor. A block also costs half a round before and after its keys, and a split's
// partial result a thirtieth for the one that combines them. No split is shorter than a page, or than 128 keys; 64
// are enough where every block has a multiprocessor to itself. Estimates: no GPU has timed them.
inline int choose_num_splits(int multiprocessors, int64_t num_sequences, int64_t num_heads_kv,
                             int64_t row_blocks, int64_t capacity, int64_t page_size) {
  constexpr int64_t kBlocksPerMultiprocessor = 2, kKeysOfARound = 64;
  const int64_t blocks = std::max<int64_t>(num_sequences * num_heads_kv * row_blocks, 1);
  const int64_t processors = std::max(multiprocessors, 1), slots = processors * kBlocksPerMultiprocessor;
  int64_t best = 1;
  double least = 0;
  for (int64_t splits = 1; splits <= kMaxSplits; ++splits) {
    const int64_t shortest = blocks * splits <= processors ? kKeysOfARound : 2 * kKeysOfARound;
    if (splits > 1 && capacity / std::max(shortest, page_size) < splits) break;
    const int64_t keys = ((capacity + splits - 1) / splits + 15) / 16 * 16;  // as Share::of_block deals them
    const int64_t rounds = (keys + kKeysOfARound - 1) / kKeysOfARound;
    const int64_t waves = (blocks * splits + slots - 1) / slots;
    const double cost =
        static_cast<double>(waves) * (static_cast<double>(rounds) + 0.5) + static_cast<double>(splits) / 32;
    if (splits == 1 || cost < least) best = splits, least = cost;
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
