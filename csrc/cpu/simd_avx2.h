// Vec with 8 lanes: AVX2, FMA, F16C.
#pragma once
#include <immintrin.h>

#include "scalar.h"

namespace zinit::cpu {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
};

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec lane_numbers() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec round_nearest(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for whole n <= 127; below -126 the result is 0.
inline Vec scale_by_power(Vec a, Vec n) {
  const __m256 normal = _mm256_cmp_ps(n.v, _mm256_set1_ps(-126.f), _CMP_GE_OQ);
  const __m256i power =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_and_ps(normal, _mm256_castsi256_ps(power)))};
}
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
// min(a, |b|) for a >= 0; NaN in b does not count.
inline Vec min_abs(Vec a, Vec b) { return min(abs(b), a); }
// a >= b ? x : y, lane by lane.
inline Vec select_ge(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ))};
}
// Whether a >= b in some lane.
inline bool any_ge(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)) != 0; }
inline float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec widen(__m128i x, BFloat16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
inline Vec widen(__m128i x, Float16) { return {_mm256_cvtph_ps(x)}; }
inline __m128i narrow(Vec a, Float16) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m128i narrow(Vec a, BFloat16) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8));
}
template <class T>
inline Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
template <class T>
inline void store(T* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
}

// The first n lanes, 0 <= n <= kLanes. The rest read as zero and are not written; memory past them is not
// touched.
template <class T>
inline Vec load_first(const T* p, int64_t n) {
  T lanes[Vec::kLanes] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store_first(T* p, int64_t n, Vec a) {
  T lanes[Vec::kLanes];
  store(lanes, a);
  __builtin_memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// In place: rows[i] lane j <-> rows[j] lane i.
[[gnu::always_inline]] inline void transpose(Vec rows[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 4) {  // 4 x 4 blocks inside the 128-bit lanes
    const __m256 a = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v),
                 b = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    const __m256 c = _mm256_unpacklo_ps(rows[i + 2].v, rows[i + 3].v);
    const __m256 d = _mm256_unpackhi_ps(rows[i + 2].v, rows[i + 3].v);
    t[i] = _mm256_shuffle_ps(a, c, 0x44), t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44), t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // the blocks themselves
    rows[i].v = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}

// Lane i = the sum of the lanes of rows[i]; half the shuffles of a transpose.
inline Vec transpose_add(const Vec rows[8]) {
  __m256 half[4];
  for (int i = 0; i < 4; ++i) {  // 128-bit halves, each of another row
    const __m256 a = rows[i].v, b = rows[i + 4].v;
    half[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  return {_mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]))};
}

}  // namespace
}  // namespace zinit::cpu
