// 16 lanes of 32-bit integers for packed weights, whatever the vectors of the instruction set. `Quads` holds 4
// codes of 0 .. 255 in each lane, and `Sums::add` adds to each lane the products of its codes with 4
// activations of 16 bits. Exact in integers, so every instruction set finds the same sums.
//
// 4 activations take 8 bytes, in the order that the instructions want:
//   VNNI     x = 256 high + low, both signed bytes: the 4 high ones, then the 4 low ones
//   others   16-bit integers 0, 2, 1, 3: products of pairs, the even codes and the odd ones apart
#pragma once
#include "tiles.h"

namespace zinit::cpu {
namespace {

constexpr int kParts = 16 / Vec::kLanes;         // vectors that 16 floats take
constexpr int32_t kMostSteps = 127 * 256 + 127;  // of an activation: 256 high + low reaches no further

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

struct Quads {
  __m512i v;
};
using Ints = Quads;

inline Quads load_quads(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Quads low_halves(Quads a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Quads high_halves(Quads a) {
  return {_mm512_and_si512(_mm512_srli_epi32(a.v, 4), _mm512_set1_epi8(15))};
}
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Vec to_floats(Ints a, int) { return {_mm512_cvtepi32_ps(a.v)}; }

inline __m512i broadcast_4_bytes(const uint8_t* x) {
  int32_t all;
  __builtin_memcpy(&all, x, 4);
  return _mm512_set1_epi32(all);
}

#if defined(__AVX512VNNI__)
struct Sums {
  __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
  [[gnu::always_inline]] void start(int32_t value) { low = _mm512_set1_epi32(value); }
  [[gnu::always_inline]] void add(Quads codes, const uint8_t* x) {
    high = _mm512_dpbusd_epi32(high, codes.v, broadcast_4_bytes(x));
    low = _mm512_dpbusd_epi32(low, codes.v, broadcast_4_bytes(x + 4));
  }
  [[gnu::always_inline]] Ints total() const { return {_mm512_add_epi32(_mm512_slli_epi32(high, 8), low)}; }
};
#else
struct Sums {
  __m512i sum = _mm512_setzero_si512();
  [[gnu::always_inline]] void start(int32_t value) { sum = _mm512_set1_epi32(value); }
  [[gnu::always_inline]] void add(Quads codes, const uint8_t* x) {
    const __m512i even = _mm512_and_si512(codes.v, _mm512_set1_epi16(255)),
                  odd = _mm512_srli_epi16(codes.v, 8);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, broadcast_4_bytes(x)));
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(odd, broadcast_4_bytes(x + 4)));
  }
  [[gnu::always_inline]] Ints total() const { return {sum}; }
};
#endif

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Quads {
  __m256i v[2];
};
using Ints = Quads;

inline Quads load_quads(const void* p) {
  const auto* at = static_cast<const __m256i*>(p);
  return {{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)}};
}
inline Quads low_halves(Quads a) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(a.v[0], mask), _mm256_and_si256(a.v[1], mask)}};
}
inline Quads high_halves(Quads a) {
  return low_halves({{_mm256_srli_epi32(a.v[0], 4), _mm256_srli_epi32(a.v[1], 4)}});
}
inline Ints add(Ints a, Ints b) {
  return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}};
}
inline Vec to_floats(Ints a, int part) { return {_mm256_cvtepi32_ps(a.v[part])}; }

struct Sums {
  __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  [[gnu::always_inline]] void start(int32_t value) { sum[0] = sum[1] = _mm256_set1_epi32(value); }
  [[gnu::always_inline]] void add(Quads codes, const uint8_t* x) {
    int32_t pairs[2];
    __builtin_memcpy(pairs, x, 8);
    const __m256i x_even = _mm256_set1_epi32(pairs[0]), x_odd = _mm256_set1_epi32(pairs[1]);
    for (int i = 0; i < 2; ++i) {
      const __m256i even = _mm256_and_si256(codes.v[i], _mm256_set1_epi16(255));
      const __m256i odd = _mm256_srli_epi16(codes.v[i], 8);
      sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(even, x_even));
      sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(odd, x_odd));
    }
  }
  [[gnu::always_inline]] Ints total() const { return {{sum[0], sum[1]}}; }
};

#else

struct Quads {
  uint8_t v[16][4];
};
struct Ints {
  int32_t v[16];
};

inline Quads load_quads(const void* p) {
  Quads a;
  __builtin_memcpy(&a, p, sizeof(a));
  return a;
}
inline Quads low_halves(Quads a) {
  for (int i = 0; i < 64; ++i) a.v[i / 4][i % 4] &= 15;
  return a;
}
inline Quads high_halves(Quads a) {
  for (int i = 0; i < 64; ++i) a.v[i / 4][i % 4] >>= 4;
  return a;
}
inline Ints add(Ints a, const Ints& b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline Vec to_floats(const Ints& a, int part) {
  const int32_t* p = a.v + part * 4;
  return {FloatLanes{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                     static_cast<float>(p[3])}};
}

struct Sums {
  Ints sum = {};
  [[gnu::always_inline]] void start(int32_t value) {
    for (int32_t& lane : sum.v) lane = value;
  }
  [[gnu::always_inline]] void add(const Quads& codes, const uint8_t* x) {
    int16_t n[4];
    __builtin_memcpy(n, x, 8);
    for (int i = 0; i < 16; ++i) {
      sum.v[i] += codes.v[i][0] * n[0] + codes.v[i][2] * n[1] + codes.v[i][1] * n[2] + codes.v[i][3] * n[3];
    }
  }
  [[gnu::always_inline]] Ints total() const { return sum; }
};

#endif

// Activations in `Sums::add`'s order, from whole numbers as floats. `count` is a multiple of 32.
inline void store_activations(const float* n, int64_t count, uint8_t* to) {
#if defined(__AVX512VNNI__)
  // One by one, a token of SmolLM2 spent 0.3 of its 4 ms here.
  for (int64_t k = 0; k < count; k += 16, to += 32) {
    const __m512i all = _mm512_cvtps_epi32(_mm512_loadu_ps(n + k));
    // rounded: low is then in -128 .. 127
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(all, _mm512_set1_epi32(128)), 8);
    const __m512i low = _mm512_sub_epi32(all, _mm512_slli_epi32(high, 8));
    const __m128i highs = _mm512_cvtepi32_epi8(high), lows = _mm512_cvtepi32_epi8(low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(highs, lows));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm_unpackhi_epi32(highs, lows));
  }
#else
  for (int64_t k = 0; k < count; k += 4, to += 8) {
    const int16_t ordered[4] = {static_cast<int16_t>(n[k]), static_cast<int16_t>(n[k + 2]),
                                static_cast<int16_t>(n[k + 1]), static_cast<int16_t>(n[k + 3])};
    __builtin_memcpy(to, ordered, 8);
  }
#endif
}

}  // namespace
}  // namespace zinit::cpu
