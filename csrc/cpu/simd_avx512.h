// Vec with 16 lanes: AVX-512 F, BW, VL, DQ.
#pragma once
// GCC 12 warns about its own _mm512_undefined_ps() wherever an intrinsic is inlined (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "scalar.h"

namespace zinit::cpu {
namespace {

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
};

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec lane_numbers() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round_nearest(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for whole n; saturates to 0 and infinity.
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// min(a, |b|) for a >= 0; NaN in b does not count. As integers: a chain of these is 4 times as fast.
inline Vec min_abs(Vec a, Vec b) {
  const __m512i size = _mm512_castps_si512(_mm512_abs_ps(b.v));
  return {_mm512_castsi512_ps(_mm512_min_epu32(_mm512_castps_si512(a.v), size))};
}
// a >= b ? x : y, lane by lane.
inline Vec select_ge(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ), y.v, x.v)};
}
// Whether a >= b in some lane.
inline bool any_ge(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ) != 0; }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec widen(__m256i x, BFloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
inline Vec widen(__m256i x, Float16) { return {_mm512_cvtph_ps(x)}; }
inline __m256i narrow(Vec a, Float16) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m256i narrow(Vec a, BFloat16) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
#if defined(__AVX512BF16__)
// In one instruction, which rounds numbers below 2^-126 to 0: for the operands of vdpbf16ps, which does the
// same.
inline __m256i narrow_operand(Vec a) { return (__m256i)_mm512_cvtneps_pbh(a.v); }
// A bfloat16 in memory that is stored that way.
struct Bf16Operand {
  uint16_t bits;
};
inline Vec widen(__m256i x, Bf16Operand) { return widen(x, BFloat16{}); }
inline __m256i narrow(Vec a, Bf16Operand) { return narrow_operand(a); }
#endif
template <class T>
inline Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
template <class T>
inline void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}

// The first n lanes, 0 <= n <= kLanes. The rest read as zero and are not written; memory past them is not
// touched.
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
template <class T>
inline Vec load_first(const T* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p), T{});
}
inline void store_first(float* p, int64_t n, Vec a) { _mm512_mask_storeu_ps(p, first(n), a.v); }
template <class T>
inline void store_first(T* p, int64_t n, Vec a) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(a, T{}));
}

// In place: rows[i] lane j <-> rows[j] lane i.
[[gnu::always_inline]] inline void transpose(Vec rows[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 4) {  // 4 x 4 blocks inside the 128-bit lanes
    const __m512 a = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v),
                 b = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    const __m512 c = _mm512_unpacklo_ps(rows[i + 2].v, rows[i + 3].v);
    const __m512 d = _mm512_unpackhi_ps(rows[i + 2].v, rows[i + 3].v);
    t[i] = _mm512_shuffle_ps(a, c, 0x44), t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44), t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // the blocks themselves
    const __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88),
                 b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    rows[i].v = _mm512_shuffle_f32x4(a, c, 0x88), rows[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    rows[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88), rows[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

// Lane i = the sum of the lanes of rows[i]; half the shuffles of a transpose.
inline Vec transpose_add(const Vec rows[16]) {
  __m512 quarter[4];
  for (int i = 0; i < 4; ++i) {
    __m512 half[2];
    for (int j = 0; j < 2; ++j) {  // 256-bit halves, then 128-bit quarters, each of another row
      const __m512 a = rows[i + 8 * j].v, b = rows[i + 8 * j + 4].v;
      half[j] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88),
                               _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
  }
  for (int i = 0; i < 4; i += 2) {
    quarter[i] = _mm512_add_ps(_mm512_unpacklo_ps(quarter[i], quarter[i + 1]),
                               _mm512_unpackhi_ps(quarter[i], quarter[i + 1]));
  }
  return {_mm512_add_ps(_mm512_shuffle_ps(quarter[0], quarter[2], 0x44),
                        _mm512_shuffle_ps(quarter[0], quarter[2], 0xee))};
}

}  // namespace
}  // namespace zinit::cpu
