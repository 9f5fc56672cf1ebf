// The float vector of the instruction set that this file is compiled for, with loads and stores of every
// element type.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

namespace zinit::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;
constexpr float kMaxFloat = 3.40282347e38f;
constexpr float kInfinity = __builtin_inff();

// 2^x within 1.5 units in the last place, for x <= 127. x must not be infinite; exp2_clamped takes that too.
// x = n + r with |r| <= 1/2, and 2^r by its minimax polynomial (relative error 9.2e-8).
inline Vec exp2(Vec x) {
  const Vec n = round_nearest(x), r = x - n;
  Vec y = broadcast(1.326472689e-3f);
  y = fma(y, r, broadcast(9.671512910e-3f));
  y = fma(y, r, broadcast(5.550733747e-2f));
  y = fma(y, r, broadcast(2.402224208e-1f));
  y = fma(y, r, broadcast(6.931469776e-1f));
  y = fma(y, r, broadcast(1.f));
  return scale_by_power(y, n);
}

// max returns its second operand where one of the two is NaN, so NaN stays.
inline Vec exp2_clamped(Vec x) { return exp2(max(broadcast(-200.f), x)); }

}  // namespace
}  // namespace zinit::cpu
