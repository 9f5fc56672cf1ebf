// Results that must be computed again with care. The faults below come with special numbers alone, and
// avoiding them everywhere would cost time in every call. So the kernels look at what they computed, which is
// cheap, and repeat an item where a result may have one of them:
//
// - A key that the mask hides from a query has the weight 0, and 0 * NaN and 0 * inf are NaN. Where the
//   queries of a tile see different keys, a value that is not finite thus reaches queries that must not see
//   it, and their result is NaN. The careful repetition takes one query at a time and packs what it does not
//   see as zeros. The arithmetic is the same otherwise, so the results of the other queries keep their bits.
// - exp2 turns -inf into NaN, and a key with an inf in it can have that score. The careful repetition clamps.
// - vdpbf16ps counts bfloat16 inputs, products and sums below 2^-126 as 0 (tiles.h). Results above kTiny keep
//   their precision all the same, up to 2^17 keys. Where there are smaller ones, and inputs that small, the
//   repetition multiplies floats.
#pragma once
#include "tiles.h"

namespace zinit::cpu {
namespace {

constexpr float kTiny = 0x1p-100f;

// What a kernel notes about its results.
template <bool kSeesTiny>
struct Extremes {
  Vec poison = broadcast(0.f);          // NaN once a result was not finite
  Vec smallest = broadcast(kMaxFloat);  // magnitude of a result

  // leads: of rows that one hidden value would spoil together, the first is enough for what is not finite.
  void note(Vec x, bool leads = true) {
    if (leads) poison = fma(x, broadcast(0.f), poison);
    if constexpr (kSeesTiny) smallest = min_abs(smallest, x);
  }
  // The first n lanes alone.
  void note_first(Vec x, int64_t n, bool leads = true) {
    note(select_ge(lane_numbers(), broadcast(static_cast<float>(n)), broadcast(kMaxFloat), x), leads);
  }
  // Numbers that are not results: 0, or NaN where one was not finite.
  void note_zeros(float x) { poison = poison + broadcast(x); }
  void note(const Extremes& other) {
    poison = poison + other.poison;
    if constexpr (kSeesTiny) smallest = min(smallest, other.smallest);
  }
  bool is_finite() const { return reduce_add(poison) == 0.f; }
  bool has_tiny() const { return kSeesTiny && any_ge(broadcast(kTiny), smallest); }
};

// As the key bias of a block: 0 for its rows `begin` .. `end`, -inf for the others, which are then packed as
// zeros.
struct Hiding {
  static constexpr int64_t kRows = 64;
  float bias[kRows];

  Hiding(int64_t begin, int64_t end) {
    for (int64_t i = 0; i < kRows; ++i) bias[i] = i >= begin && i < end ? 0.f : -kInfinity;
  }
  // What another bias hides too; nullptr: nothing.
  void add(const float* other, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (hidden(other, i)) bias[i] = -kInfinity;
    }
  }
};

// Whether an element of some rows is smaller than kTiny, and not 0.
template <class T>
inline bool has_tiny(Rows<T> rows, int64_t count, int64_t D) {
  Vec smallest = broadcast(kMaxFloat);
  const Vec zero = broadcast(0.f);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < D; d += kLanes) {
      const Vec size = abs(load_columns(rows[i], d, D));
      smallest = min(smallest, select_ge(zero, size, smallest, size));
    }
  }
  return any_ge(broadcast(kTiny), smallest);
}

#if defined(__AVX512BF16__)
// The same, a quarter of the instructions: without their signs bfloat16 numbers are in the order of their
// bits, and 0 minus 1 is the largest of all.
template <>
inline bool has_tiny(Rows<BFloat16> rows, int64_t count, int64_t D) {
  constexpr uint16_t kTinyBits = (127 - 100) << 8;  // kTiny, shifted left by 1
  __m512i smallest = _mm512_set1_epi16(-1);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < D; d += 32) {
      const auto inside = static_cast<__mmask32>(D - d >= 32 ? ~uint32_t{0} : (uint32_t{1} << (D - d)) - 1);
      const __m512i bits = _mm512_slli_epi16(_mm512_maskz_loadu_epi16(inside, rows[i] + d), 1);
      smallest = _mm512_min_epu16(smallest, _mm512_sub_epi16(bits, _mm512_set1_epi16(1)));
    }
  }
  return _mm512_cmplt_epu16_mask(smallest, _mm512_set1_epi16(kTinyBits)) != 0;
}
#endif

}  // namespace
}  // namespace zinit::cpu
