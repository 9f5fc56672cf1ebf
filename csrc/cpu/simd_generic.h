// Vec with 4 lanes on GCC's and clang's vector extension: SSE2, NEON, anything.
#pragma once
#include <cstddef>

#include "scalar.h"

namespace zinit::cpu {
namespace {

typedef float FloatLanes __attribute__((vector_size(16)));
typedef float UnalignedFloatLanes __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t IntLanes __attribute__((vector_size(16)));

struct Vec {
  static constexpr int kLanes = 4;
  FloatLanes v;
};

inline Vec broadcast(float x) { return {FloatLanes{x, x, x, x}}; }
inline Vec lane_numbers() { return {FloatLanes{0, 1, 2, 3}}; }

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec abs(Vec a) { return {(FloatLanes)((IntLanes)a.v & 0x7fffffff)}; }
// min(a, |b|) for a >= 0; NaN in b does not count.
inline Vec min_abs(Vec a, Vec b) { return min(abs(b), a); }
// a >= b ? x : y, lane by lane.
inline Vec select_ge(Vec a, Vec b, Vec x, Vec y) { return {a.v >= b.v ? x.v : y.v}; }
inline Vec round_nearest(Vec a) {  // adding 1.5 * 2^23 leaves no fraction bits; larger numbers have none
  const Vec magic = broadcast(12582912.f), rounded = (a + magic) - magic;
  const Vec size = max(a, broadcast(0.f) - a);
  return select_ge(size, broadcast(4194304.f), a, rounded);
}
// a * 2^n for whole n <= 127; below -126 the result is 0.
inline Vec scale_by_power(Vec a, Vec n) {
  const IntLanes power = (__builtin_convertvector(max(n, broadcast(-127.f)).v, IntLanes) + 127) << 23;
  return {a.v * (FloatLanes)power};
}
// Whether a >= b in some lane.
inline bool any_ge(Vec a, Vec b) {
  const IntLanes found = a.v >= b.v;
  return (found[0] | found[1] | found[2] | found[3]) != 0;
}
inline float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float reduce_max(Vec a) {
  float x = a.v[0];
  for (int i = 1; i < 4; ++i) x = a.v[i] > x ? a.v[i] : x;
  return x;
}

inline Vec load(const float* p) { return {*reinterpret_cast<const UnalignedFloatLanes*>(p)}; }
template <class T>
inline Vec load(const T* p) {
  return {FloatLanes{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
inline void store(float* p, Vec a) { *reinterpret_cast<UnalignedFloatLanes*>(p) = a.v; }
template <class T>
inline void store(T* p, Vec a) {
  for (int i = 0; i < 4; ++i) from_float(a.v[i], p + i);
}

// The first n lanes, 0 <= n <= kLanes. The rest read as zero and are not written; memory past them is not
// touched.
template <class T>
inline Vec load_first(const T* p, int64_t n) {
  Vec a = broadcast(0.f);
  for (int64_t i = 0; i < n; ++i) a.v[i] = to_float(p[i]);
  return a;
}
template <class T>
inline void store_first(T* p, int64_t n, Vec a) {
  for (int64_t i = 0; i < n; ++i) from_float(a.v[i], p + i);
}

// In place: rows[i] lane j <-> rows[j] lane i.
[[gnu::always_inline]] inline void transpose(Vec rows[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = x;
    }
  }
}

// Lane i = the sum of the lanes of rows[i].
inline Vec transpose_add(const Vec rows[4]) {
  return {FloatLanes{reduce_add(rows[0]), reduce_add(rows[1]), reduce_add(rows[2]), reduce_add(rows[3])}};
}

}  // namespace
}  // namespace zinit::cpu
