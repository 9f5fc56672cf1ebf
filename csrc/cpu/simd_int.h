// 16 lanes of 32-bit integers for packed weights, whatever the vectors of the instruction set: `Pairs` holds a
// pair of 16-bit numbers in each lane, and `dot` adds to each lane the product of its pair with a pair of
// activations. Exact in integers, so every instruction set finds the same sums.
#pragma once
#include "tiles.h"

namespace zinit::cpu {
namespace {

constexpr int kParts = 16 / Vec::kLanes;  // vectors that 16 floats take

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

struct Ints {
  __m512i v;
};
using Pairs = Ints;

inline Ints zero_ints() { return {_mm512_setzero_si512()}; }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints subtract(Ints a, int32_t b) { return {_mm512_sub_epi32(a.v, _mm512_set1_epi32(b))}; }
inline Pairs load_bytes(const int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Ints load_words(const void* p) { return {_mm512_loadu_si512(p)}; }
// Nibbles j and j + 4 of each word.
template <int J>
inline Pairs nibbles(Ints words) {
  return {
      _mm512_and_si512(J == 0 ? words.v : _mm512_srli_epi32(words.v, 4 * J), _mm512_set1_epi32(0x000f000f))};
}
inline Ints dot(Ints sum, Pairs a, const int16_t* pair) {
  int32_t both;
  __builtin_memcpy(&both, pair, 4);
#if defined(__AVX512VNNI__)
  return {_mm512_dpwssd_epi32(sum.v, a.v, _mm512_set1_epi32(both))};
#else
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, _mm512_set1_epi32(both)))};
#endif
}
inline Vec to_floats(Ints a, int) { return {_mm512_cvtepi32_ps(a.v)}; }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Ints {
  __m256i v[2];
};
using Pairs = Ints;

inline Ints zero_ints() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
inline Ints add(Ints a, Ints b) {
  return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}};
}
inline Ints subtract(Ints a, int32_t b) {
  const __m256i all = _mm256_set1_epi32(b);
  return {{_mm256_sub_epi32(a.v[0], all), _mm256_sub_epi32(a.v[1], all)}};
}
inline Pairs load_bytes(const int8_t* p) {
  const auto* at = reinterpret_cast<const __m128i*>(p);
  return {{_mm256_cvtepi8_epi16(_mm_loadu_si128(at)), _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 1))}};
}
inline Ints load_words(const void* p) {
  const auto* at = static_cast<const __m256i*>(p);
  return {{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)}};
}
template <int J>
inline Pairs nibbles(Ints words) {
  const __m256i mask = _mm256_set1_epi32(0x000f000f);
  return {{_mm256_and_si256(_mm256_srli_epi32(words.v[0], 4 * J), mask),
           _mm256_and_si256(_mm256_srli_epi32(words.v[1], 4 * J), mask)}};
}
inline Ints dot(Ints sum, Pairs a, const int16_t* pair) {
  int32_t both;
  __builtin_memcpy(&both, pair, 4);
  const __m256i x = _mm256_set1_epi32(both);
  return {{_mm256_add_epi32(sum.v[0], _mm256_madd_epi16(a.v[0], x)),
           _mm256_add_epi32(sum.v[1], _mm256_madd_epi16(a.v[1], x))}};
}
inline Vec to_floats(Ints a, int part) { return {_mm256_cvtepi32_ps(a.v[part])}; }

#else

struct Ints {
  int32_t v[16];
};
struct Pairs {
  int16_t low[16], high[16];
};

inline Ints zero_ints() { return {}; }
inline Ints add(Ints a, const Ints& b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline Ints subtract(Ints a, int32_t b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b;
  return a;
}
inline Pairs load_bytes(const int8_t* p) {
  Pairs a;
  for (int i = 0; i < 16; ++i) a.low[i] = p[2 * i], a.high[i] = p[2 * i + 1];
  return a;
}
inline Ints load_words(const void* p) {
  Ints a;
  __builtin_memcpy(&a, p, sizeof(a));
  return a;
}
template <int J>
inline Pairs nibbles(const Ints& words) {
  Pairs a;
  for (int i = 0; i < 16; ++i) {
    const uint32_t word = static_cast<uint32_t>(words.v[i]) >> (4 * J);
    a.low[i] = static_cast<int16_t>(word & 15), a.high[i] = static_cast<int16_t>(word >> 16 & 15);
  }
  return a;
}
inline Ints dot(Ints sum, const Pairs& a, const int16_t* pair) {
  for (int i = 0; i < 16; ++i) sum.v[i] += a.low[i] * pair[0] + a.high[i] * pair[1];
  return sum;
}
inline Vec to_floats(const Ints& a, int part) {
  const int32_t* p = a.v + part * 4;
  return {FloatLanes{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                     static_cast<float>(p[3])}};
}

#endif

}  // namespace
}  // namespace zinit::cpu
