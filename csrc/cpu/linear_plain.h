// Products of a few rows with a weight that lies in memory as it is, row after row. The columns are in lanes:
// a step multiplies one vector of each of R weight rows with one vector of each of M activation rows. The
// weights are read once; everything else stays in the level 1 cache.
#pragma once
#include "linear_work.h"
#include "tiles.h"

namespace zinit::cpu {
namespace {

constexpr int kRowBlock = 8;  // activation rows that meet a weight vector while it is in a register

// Activations as floats: every element type, every processor.
template <class T>
struct FloatDot {
  using Operand = float;
  static constexpr int kStep = Vec::kLanes;  // columns
  using Part = Vec;
  static Part load_weight(const T* p) { return load(p); }
  static Part load_weight_first(const T* p, int64_t n) { return load_first(p, n); }
  static Part load_operand(const Operand* p) { return load(p); }
  static Vec multiply_add(Part a, Part b, Vec sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
// Activations as bfloat16, two columns to a lane.
struct Bf16Dot {
  using Operand = BFloat16;
  static constexpr int kStep = 32;
  using Part = __m512bh;
  static Part load_weight(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Part load_weight_first(const BFloat16* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p);
  }
  static Part load_operand(const Operand* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Vec multiply_add(Part a, Part b, Vec sum) { return {_mm512_dpbf16_ps(sum.v, a, b)}; }
};
template <class T>
struct DotOf {
  using Type = FloatDot<T>;
};
template <>
struct DotOf<BFloat16> {
  using Type = Bf16Dot;
};
#else
template <class T>
struct DotOf {
  using Type = FloatDot<T>;
};
#endif

// Whether a plain weight of this dtype meets activations in bfloat16.
inline bool multiplies_bfloat16([[maybe_unused]] DType dtype) {
#if defined(__AVX512BF16__)
  return dtype == DType::kBFloat16;
#else
  return false;
#endif
}

// Sums of the lanes of `count` vectors, always in the same order: so a row's result does not depend on how many
// rows there are. With 16 lanes transpose_add has the order of reduce_add.
inline void reduce_lanes(const Vec* sums, int count, float* to) {
  int i = 0;
  if constexpr (Vec::kLanes == 16) {
    for (; i + 16 <= count; i += 16) store(to + i, transpose_add(sums + i));
  }
  for (; i < count; ++i) to[i] = reduce_add(sums[i]);
}

// How a weight is walked through. Memory is read fastest from one end to the other, so weight rows are taken one
// at a time while all activations stay in the level 1 cache (32 KiB; the limit leaves room for the weights).
// Longer activations come from the level 2 cache for every pass over them, and then four rows share a pass.
//
// Zen 4, two threads, bfloat16, GB/s of weights; a plain read of them moves 35 to 37. K columns, M rows:
//
//   rows at a time         1      2      4      8, each asking for its next row
//   K = 576,  M = 1      32.0   22.3   24.4   22.3
//   K = 576,  M = 4      26.6   18.5   18.2
//   K = 8192, M = 4      18.9   25.1   27.3 (asking for the next row)
//   K = 2048, M = 8      14.8   19.2   22.0
constexpr int64_t kOperandBytes = 20 << 10;
constexpr int64_t kWeightsAhead =
    4096;  // bytes; 26.4 GB/s at K = 576, M = 4, two rows at a time, and 24.2 at 8192

// to[r * M + m] = weight row r . activation row m. kAhead: asks for the weights that follow in memory.
template <class Dot, class T, int R, int M, bool kAhead>
[[gnu::always_inline]] inline void dot_rows(const T* weight, int64_t K, const typename Dot::Operand* x,
                                            int64_t x_stride, float* to) {
  constexpr int64_t kBytes = sizeof(T);
  Vec sums[R * M];
  for (int i = 0; i < R * M; ++i) sums[i] = broadcast(0.f);
  int64_t k = 0;
  for (; k + Dot::kStep <= K; k += Dot::kStep) {
    typename Dot::Part w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) w[r] = Dot::load_weight(weight + r * K + k);
    if (kAhead && k * kBytes % 64 == 0) {
      const char* ahead = reinterpret_cast<const char*>(weight) + R * k * kBytes + kWeightsAhead;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + 64 * r);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename Dot::Part operand = Dot::load_operand(x + m * x_stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r * M + m] = Dot::multiply_add(w[r], operand, sums[r * M + m]);
    }
  }
  if (k < K) {
    for (int r = 0; r < R; ++r) {
      const typename Dot::Part w = Dot::load_weight_first(weight + r * K + k, K - k);
      for (int m = 0; m < M; ++m) {
        sums[r * M + m] = Dot::multiply_add(w, Dot::load_operand(x + m * x_stride + k), sums[r * M + m]);
      }
    }
  }
  reduce_lanes(sums, R * M, to);
}

// sums[m * stride + n] for `count` weight rows from `weight` on, R at a time.
template <class Dot, class T, int R, int M, bool kAhead>
inline void multiply_rows_by(const T* weight, int64_t count, int64_t K, const typename Dot::Operand* x,
                             int64_t x_stride, float* sums, int64_t stride) {
  float found[R * M];
  int64_t n = 0;
  for (; n + R <= count; n += R) {
    dot_rows<Dot, T, R, M, kAhead>(weight + n * K, K, x, x_stride, found);
    for (int m = 0; m < M; ++m) {
      for (int r = 0; r < R; ++r) sums[m * stride + n + r] = found[r * M + m];
    }
  }
  for (; n < count; ++n) {
    dot_rows<Dot, T, 1, M, kAhead>(weight + n * K, K, x, x_stride, found);
    for (int m = 0; m < M; ++m) sums[m * stride + n] = found[m];
  }
}

template <class Dot, class T, int M>
inline void multiply_rows(const T* weight, int64_t count, int64_t K, const typename Dot::Operand* x,
                          int64_t x_stride, float* sums, int64_t stride) {
  // The sum of a row is a chain of additions, each 4 to 6 cycles after the last. Chains of narrow loads alone would
  // be slower than memory.
  constexpr int64_t kChains = 64 / (Dot::kStep * static_cast<int64_t>(sizeof(T)));
  constexpr int kFew = kChains > M ? kChains / M : 1;
  // with 16 registers what is more than 8 sums goes to memory and back; with 32 registers 4 x 8 are fastest all the same
  constexpr int kMany = Vec::kLanes == 16 || M <= 2 ? 4 : M <= 4 ? 2 : 1;
  if (M * K * static_cast<int64_t>(sizeof(typename Dot::Operand)) <= kOperandBytes) {
    // the processor sees one stream coming; many rows of activations leave it less time
    constexpr bool kAhead = kFew > 1 || M > 6;
    multiply_rows_by<Dot, T, kFew, M, kAhead>(weight, count, K, x, x_stride, sums, stride);
  } else {
    multiply_rows_by<Dot, T, kMany, M, false>(weight, count, K, x, x_stride, sums, stride);
  }
}

// f.operator()<M>() for 1 <= m <= 8
template <class F>
inline void with_rows(int64_t m, F f) {
  switch (m) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    case 6:
      return f.template operator()<6>();
    case 7:
      return f.template operator()<7>();
    default:
      return f.template operator()<8>();
  }
}

// Weight rows first .. first + count of a plain weight; x: `rows` padded rows of Dot's operands.
inline void multiply_plain(const LinearWeight& weight, int64_t first, int64_t count, const void* x,
                           int64_t x_stride, int64_t rows, float* sums, int64_t stride) {
  with_dtype(weight.dtype, [&]<class T>() {
    using Dot = typename DotOf<T>::Type;
    const T* data = static_cast<const T*>(weight.data) + first * weight.columns;
    const auto* operand = static_cast<const typename Dot::Operand*>(x);
    for (int64_t m = 0; m < rows; m += kRowBlock) {
      with_rows(min(rows - m, kRowBlock), [&]<int M>() {
        multiply_rows<Dot, T, M>(data, count, weight.columns, operand + m * x_stride, x_stride,
                                 sums + m * stride, stride);
      });
    }
  });
}

}  // namespace
}  // namespace zinit::cpu
