// The arguments whose elements decide which memory a CPU kernel touches: copied once, then checked.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "../arguments.h"

namespace zinit::cpu {

// Copies of small int32 arguments, for one call. Kernels read the numbers that were checked, even where
// another thread writes to the tensors in the meantime. The loads are atomic, so that the compiler cannot
// read a number a second time for its check.
class Copies {
 public:
  Copies() = default;
  Copies(const Copies&) = delete;
  Copies& operator=(const Copies&) = delete;

  static int32_t read(const int32_t* from) { return __atomic_load_n(from, __ATOMIC_RELAXED); }

  // Room for `count` numbers until the call ends.
  int32_t* room(int64_t count) {
    if (used_ + count <= kFew) {
      used_ += count;
      return few_ + used_ - count;
    }
    many_.push_back(std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(count)));
    return many_.back().get();
  }
  const int32_t* of(const int32_t* from, int64_t count) {
    int32_t* to = room(count);
    for (int64_t i = 0; i < count; ++i) to[i] = read(from + i);
    return to;
  }

 private:
  static constexpr int64_t kFew = 256;  // these need no allocation
  int32_t few_[kFew];
  int64_t used_ = 0;
  std::vector<std::unique_ptr<int32_t[]>> many_;
};

inline void copy_prompt_index(AttentionParams& p, Copies& copies) {
  if (p.prompt_index == nullptr) return;
  p.prompt_index = copies.of(p.prompt_index, p.num_sequences);
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    ZINIT_CHECK(p.prompt_index[b] >= -1 && p.prompt_index[b] < p.prompt_rows,
                "prompt_index must be -1 or below ", p.prompt_rows, ", got ", p.prompt_index[b],
                " for sequence ", b);
  }
}

// Boundaries of packed sequences: rising from 0, each sequence at most `longest` rows, all within `total`.
inline const int32_t* copy_cumulative(const int32_t* from, const char* name, int64_t num_sequences,
                                      int64_t longest, int64_t total, Copies& copies) {
  const int32_t* cu = copies.of(from, num_sequences + 1);
  ZINIT_CHECK(cu[0] == 0, name, " must begin with 0, got ", cu[0]);
  for (int64_t b = 0; b < num_sequences; ++b) {
    const int64_t length = static_cast<int64_t>(cu[b + 1]) - cu[b];
    ZINIT_CHECK(length >= 0 && length <= longest, name, " must rise by 0 to ", longest,
                " (the longest sequence), got ", cu[b], " then ", cu[b + 1]);
  }
  ZINIT_CHECK(cu[num_sequences] == total, name, " must end with the number of rows, ", total, ", got ",
              cu[num_sequences]);
  return cu;
}

inline int64_t longest_of(const int32_t* cu_seqlens, int64_t num_sequences) {
  int64_t longest = 0;
  for (int64_t b = 0; b < num_sequences; ++b) {
    longest = std::max<int64_t>(longest, cu_seqlens[b + 1] - cu_seqlens[b]);
  }
  return longest;
}

// Lengths, rotary positions and pages. Of the block table only the entries in use are copied and checked.
// Returns the longest sequence after the append; nothing has been written yet.
inline int64_t copy_lengths(DecodeParams& p, Copies& copies) {
  p.cache_seqlens = copies.of(p.cache_seqlens, p.num_sequences);
  // with neither mask nor window all queries turn by the first position
  const int64_t turned = p.rotate_by_token ? p.seqlen_q : std::min<int64_t>(p.seqlen_q, 1);
  int64_t longest = 0;
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const int64_t length = p.cache_seqlens[b], total = length + p.seqlen_new;
    ZINIT_CHECK(length >= 0 && total <= p.seqlen_k, "cache_seqlens[", b, "] = ", length, " plus ",
                p.seqlen_new, " new tokens must lie in 0 .. ", p.seqlen_k,
                ", the capacity of the cache: make the cache longer (or give the sequence more pages)");
    const int64_t rotated = std::max(p.seqlen_new, turned);
    ZINIT_CHECK(p.rotary_cos == nullptr || rotated == 0 || length + rotated <= p.rotary_positions,
                "rotary_cos has ", p.rotary_positions, " positions, sequence ", b, " needs ",
                length + rotated);
    longest = std::max(longest, total);
  }
  if (p.block_table == nullptr) return longest;
  const auto pages = [&](int64_t keys) { return keys == 0 ? 0 : (keys - 1) / p.page_size + 1; };
  const int64_t columns = pages(longest);
  int32_t* table = copies.room(p.num_sequences * columns);
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    for (int64_t i = 0; i < pages(p.cache_seqlens[b] + p.seqlen_new); ++i) {
      const int32_t page = Copies::read(p.block_table + b * p.block_table_stride + i);
      ZINIT_CHECK(page >= 0 && page < p.num_pages, "block_table[", b, ", ", i, "] must lie in 0 .. ",
                  p.num_pages - 1, ", the pages there are, got ", page);
      table[b * columns + i] = page;
    }
  }
  p.block_table = table, p.block_table_stride = columns;
  return longest;
}

// A window that reaches past every key is unlimited: -1.
inline void set_mask(AttentionParams& p, double scale, int64_t window_left, int64_t window_right,
                     bool tanh_gate) {
  const int64_t all = p.seqlen_q + p.seqlen_k;
  p.window_left = window_left < 0 || window_left >= all ? -1 : window_left;
  p.window_right = window_right < 0 || window_right >= all ? -1 : window_right;
  p.scale = static_cast<float>(scale);
  p.tanh_gate = tanh_gate;
}

}  // namespace zinit::cpu
