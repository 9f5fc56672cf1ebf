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
  // Replaces what was given by its copy.
  void replace(Array<const int32_t>& numbers, int64_t count) {
    if (!numbers.given) return;
    int32_t* copy = room(count);
    for (int64_t i = 0; i < count; ++i) copy[i] = read(numbers.data + i);
    numbers.data = copy;
  }

 private:
  static constexpr int64_t kFew = 256;  // these need no allocation
  int32_t few_[kFew];
  int64_t used_ = 0;
  std::vector<std::unique_ptr<int32_t[]>> many_;
};

// The index has been copied.
inline void check_prompt_index(const AttentionParams& w) {
  for (int64_t b = 0; b < w.num_sequences; ++b) {
    const int32_t row = w.prompt_index.data[b];
    ZINIT_CHECK(row >= -1 && row < w.prompt_rows, "prompt_index must be -1 or below ", w.prompt_rows,
                ", got ", row, " for sequence ", b);
  }
}

inline void copy_prompt_index(AttentionParams& w, Copies& copies) {
  if (!w.prompt_index.given) return;
  copies.replace(w.prompt_index, w.num_sequences);
  check_prompt_index(w);
}

// Boundaries of packed sequences: rising from 0, each sequence at most `longest` rows, all within `total`.
inline void copy_cumulative(Array<const int32_t>& cu_seqlens, const char* name, int64_t num_sequences,
                            int64_t longest, int64_t total, Copies& copies) {
  copies.replace(cu_seqlens, num_sequences + 1);
  const int32_t* cu = cu_seqlens.data;
  ZINIT_CHECK(cu[0] == 0, name, " must begin with 0, got ", cu[0]);
  for (int64_t b = 0; b < num_sequences; ++b) {
    const int64_t length = static_cast<int64_t>(cu[b + 1]) - cu[b];
    ZINIT_CHECK(length >= 0 && length <= longest, name, " must rise by 0 to ", longest,
                " (the longest sequence), got ", cu[b], " then ", cu[b + 1]);
  }
  ZINIT_CHECK(cu[num_sequences] == total, name, " must end with the number of rows, ", total, ", got ",
              cu[num_sequences]);
}

inline int64_t longest_of(Array<const int32_t> cu_seqlens, int64_t num_sequences) {
  int64_t longest = 0;
  for (int64_t b = 0; b < num_sequences; ++b) {
    longest = std::max<int64_t>(longest, cu_seqlens.data[b + 1] - cu_seqlens.data[b]);
  }
  return longest;
}

// Lengths, rotary positions and pages. Of the block table only the entries in use are copied and checked.
// Returns the longest sequence after the append; nothing has been written yet.
inline int64_t copy_lengths(DecodeParams& w, Copies& copies) {
  copies.replace(w.cache_seqlens, w.num_sequences);
  copies.replace(w.cache_leftpad, w.num_sequences);
  const int32_t* lengths = w.cache_seqlens.data;
  const int64_t turned = w.rotary.by_token ? w.seqlen_q : std::min<int64_t>(w.seqlen_q, 1);
  const int64_t rotated = std::max(w.seqlen_new, turned);
  int64_t longest = 0;
  for (int64_t b = 0; b < w.num_sequences; ++b) {
    const int64_t length = lengths[b], total = length + w.seqlen_new;
    ZINIT_CHECK(length >= 0 && total <= w.seqlen_k, "cache_seqlens[", b, "] = ", length, " plus ",
                w.seqlen_new, " new tokens must lie in 0 .. ", w.seqlen_k,
                ", the capacity of the cache: make the cache longer (or give the sequence more pages)");
    ZINIT_CHECK(!w.cache_leftpad.given || (w.cache_leftpad.data[b] >= 0 && w.cache_leftpad.data[b] <= length),
                "cache_leftpad[", b, "] = ", w.cache_leftpad.data[b], " must lie in 0 .. ", length,
                ", the sequence's cache_seqlens, which count the padding too");
    ZINIT_CHECK(!w.rotary.given || rotated == 0 || length + rotated <= w.rotary.positions, "rotary_cos has ",
                w.rotary.positions, " positions, sequence ", b, " needs ", length + rotated);
    longest = std::max(longest, total);
  }
  if (!w.block_table.given) return longest;
  const auto pages = [&](int64_t keys) { return keys == 0 ? 0 : (keys - 1) / w.page_size + 1; };
  const int64_t columns = pages(longest);
  int32_t* table = copies.room(w.num_sequences * columns);
  for (int64_t b = 0; b < w.num_sequences; ++b) {
    for (int64_t i = 0; i < pages(lengths[b] + w.seqlen_new); ++i) {
      const int32_t page = Copies::read(w.block_table.data + b * w.block_table_stride + i);
      ZINIT_CHECK(page >= 0 && page < w.num_pages, "block_table[", b, ", ", i, "] must lie in 0 .. ",
                  w.num_pages - 1, ", the pages there are, got ", page);
      table[b * columns + i] = page;
    }
  }
  w.block_table.data = table, w.block_table_stride = columns;
  return longest;
}

// A window that reaches past every key is unlimited: -1.
inline void set_mask(AttentionParams& w, double scale, double softcap, int64_t window_left,
                     int64_t window_right, bool tanh_gate) {
  const int64_t all = w.seqlen_q + w.seqlen_k;
  w.window_left = window_left < 0 || window_left >= all ? -1 : window_left;
  w.window_right = window_right < 0 || window_right >= all ? -1 : window_right;
  w.scale = static_cast<float>(scale);
  w.softcap = static_cast<float>(softcap);
  w.tanh_gate = tanh_gate;
}

}  // namespace zinit::cpu
