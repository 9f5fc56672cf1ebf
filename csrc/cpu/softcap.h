// A soft cap on scores: s becomes cap * tanh(s / cap).
#pragma once
#include "tiles.h"

namespace zinit::cpu {
namespace {

// Within 2 units in the last place. Below 0.6 x + x^3 p(x^2) with a minimax p, where 1 - 2 / (e^2x + 1) would
// cancel. NaN stays: min returns its second operand where one of the two is NaN.
inline Vec tanh(Vec x) {
  const Vec size = abs(x), z = x * x, zero = broadcast(0.f), one = broadcast(1.f);
  Vec y = broadcast(-5.905871279537678e-3f);
  y = fma(y, z, broadcast(2.080538682639599e-2f));
  y = fma(y, z, broadcast(-5.3786683827638626e-2f));
  y = fma(y, z, broadcast(1.3331958651542664e-1f));
  y = fma(y, z, broadcast(-3.3333298563957214e-1f));
  const Vec near = fma(x, z * y, x);
  const Vec power = exp2(min(broadcast(40.f), size) * broadcast(2.f * kLog2E));
  const Vec far = one - broadcast(2.f) / (power + one);
  return select_ge(size, broadcast(0.6f), select_ge(x, zero, far, zero - far), near);
}

// Rows begin .. end of one vector of scores, which count `scale` times. `slopes` gets the derivative, where
// the scores lie; nullptr: nobody wants it.
[[gnu::noinline]] void cap_scores(int64_t begin, int64_t end, float scale, float cap, float* scores,
                                  int64_t row, float* slopes) {
  const Vec times = broadcast(scale), inverse = broadcast(1.f / cap), size = broadcast(cap);
  for (int64_t j = begin; j < end; ++j) {
    const Vec t = tanh(load(scores + j * row) * times * inverse);
    store(scores + j * row, size * t);
    if (slopes) store(slopes + j * row, fma(broadcast(0.f) - t, t, broadcast(1.f)));
  }
}

}  // namespace
}  // namespace zinit::cpu
