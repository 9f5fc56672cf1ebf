// Whether two strided tensors have elements in common. No torch.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>

namespace zinit {

// Bytes from its first element to behind its last one; strides are not negative, as torch's.
struct Footprint {
  uintptr_t begin = 0;
  int64_t element_bytes = 0;
  std::array<int64_t, 4> sizes{}, strides{};  // counted in elements

  bool is_empty() const { return std::ranges::find(sizes, 0) != sizes.end(); }
  int64_t reach() const {
    int64_t last = 0;
    for (size_t i = 0; i < 4; ++i) last += (sizes[i] - 1) * strides[i];
    return last * element_bytes;
  }
};

// Whether one place in memory stands for several elements: expanded tensors, sliding windows.
inline bool overlaps_itself(const Footprint& f) {
  std::array<std::array<int64_t, 2>, 4> steps;
  for (size_t i = 0; i < 4; ++i) steps[i] = {f.strides[i], f.sizes[i]};
  std::ranges::sort(steps);
  int64_t reach = 0;  // of the dimensions with shorter steps
  for (const auto& [step, size] : steps) {
    if (size <= 1) continue;
    if (step <= reach) return true;
    reach += step * (size - 1);
  }
  return false;
}

// `count` steps of that many bytes, at most.
struct Walk {
  int64_t step, count;
};

// Whether `distance` is a sum of steps, each walk's taken from 0 to `count` times. Walks come in the order of
// their steps, the longest first, so few counts of each are possible. After kMost tries the answer is yes.
inline bool reaches(const Walk* walk, const Walk* end, int64_t distance, int& tries) {
  constexpr int kMost = 10000;
  if (distance == 0 || ++tries > kMost) return true;
  int64_t rest = 0;  // what the other walks can add
  for (const Walk* other = walk; other < end; ++other) rest += other->step * other->count;
  if (walk == end || distance > rest) return false;
  rest -= walk->step * walk->count;
  const int64_t most = std::min(walk->count, distance / walk->step);
  const int64_t least = std::max<int64_t>(0, (distance - rest + walk->step - 1) / walk->step);
  for (int64_t n = most; n >= least; --n) {
    if (reaches(walk + 1, end, distance - n * walk->step, tries)) return true;
  }
  return false;
}

inline bool share_memory(const Footprint& a, const Footprint& b) {
  if (a.is_empty() || b.is_empty()) return false;
  const auto distance = static_cast<int64_t>(b.begin - a.begin);
  if (distance > a.reach() || -distance > b.reach()) return false;
  // a[i] is b[j] where sum of i * a's strides = distance + sum of j * b's strides; j is counted from its end
  std::array<Walk, 8> walks;
  for (size_t i = 0; i < 4; ++i) {
    walks[i] = {a.strides[i] * a.element_bytes, a.sizes[i] - 1};
    walks[4 + i] = {b.strides[i] * b.element_bytes, b.sizes[i] - 1};
  }
  std::ranges::sort(walks, std::ranges::greater(), &Walk::step);
  const auto end = std::ranges::find(walks, 0, &Walk::step);
  int tries = 0;
  return reaches(walks.data(), walks.data() + (end - walks.begin()), distance + b.reach(), tries);
}

}  // namespace zinit
