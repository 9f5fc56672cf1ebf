// Products of many rows with a packed weight: a prompt's pass. Bound by arithmetic, so both sides are first laid out as
// the multiplications take them, and the weight is never there as a whole: 48 rows of it at a time.
//
// A step is one column in float32, or two neighbouring ones in bfloat16 (vdpbf16ps); it fills 32 bits of a row. The rows
// of the weight lie in lanes, and a number of an activation is broadcast:
//
//   activations   panels [steps][8] of 8 rows, laid out once for all weight rows
//   weight        panels [steps][16], [steps][32] or [steps][48] of as many weight rows, in a thread's scratch
//
// 8 rows and 3 vectors of weights are 24 sums, which leaves registers for 3 weights and some activations. Zen 4, two
// threads, 512 rows, int4, GFLOP/s; before: all of the weight as numbers, then torch's product.
//
//   columns x rows          576 x 576   576 x 192   576 x 1536   1536 x 576   2048 x 8192
//   float32    before, now  178, 217    137, 195    163, 213     151, 173     127, 203
//   bfloat16   before, now  337, 401    302, 376    342, 407     353, 400     324, 389
//
// With plain weights the same kernel is as fast as torch's products (0.9 to 1.1), so those stay torch's.
#pragma once
#include "kernels.h"
#include "linear_packed.h"

namespace zinit::cpu {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
constexpr bool kHasManyRows = true;

constexpr int64_t kManyRows = 8, kManyVectors = 3;

inline bool in_pairs(const ManyWork& w) { return multiplies_bfloat16(w.dtype); }
inline int64_t steps_of(const ManyWork& w) {
  return in_pairs(w) ? ceil_div(w.weight.columns, 2) : w.weight.columns;
}

// 16 steps of a row from column k on, as 32 bits each; zeros past its end.
template <bool kPairs, class T>
[[gnu::always_inline]] inline Vec steps_at(const T* row, int64_t k, int64_t K) {
  if constexpr (kPairs) {
    const int64_t left = K - k;
    const auto* at = reinterpret_cast<const __m512i*>(row + k);
    if (left >= 32) return {_mm512_castsi512_ps(_mm512_loadu_si512(at))};
    const __mmask32 mask = static_cast<__mmask32>((1ull << max(left, 0)) - 1);
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, at))};
  } else {
    return k + 16 <= K ? load(row + k) : load_first(row + k, max(K - k, 0));
  }
}

// f(kPairs, T) for the element type of a work's tensors.
template <class F>
inline void with_steps(const ManyWork& w, F f) {
  with_dtype(w.dtype, [&]<class T>() {
#if defined(__AVX512BF16__)
    if constexpr (__is_same(T, BFloat16)) return f.template operator()<true, T>();
#endif
    f.template operator()<false, T>();
  });
}

int64_t many_layout_items(const ManyWork& w) { return ceil_div(w.num_rows, 2 * kManyRows); }

// Two panels of activations.
void many_layout_run(const ManyWork& w, int64_t begin, int64_t end, void*) {
  const int64_t K = w.weight.columns, steps = steps_of(w);
  with_steps(w, [&]<bool kPairs, class T>() {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item * 2 * kManyRows, count = min(w.num_rows - first, 16);
      float* low = w.operand + first * steps;
      float* high = low + kManyRows * steps;
      for (int64_t s = 0; s < steps; s += 16) {
        Vec rows[16];
        for (int64_t m = 0; m < 16; ++m) {
          rows[m] = m < count ? steps_at<kPairs>(static_cast<const T*>(w.input) + (first + m) * K,
                                                 kPairs ? 2 * s : s, K)
                              : broadcast(0.f);
        }
        transpose(rows);
        for (int64_t i = 0; i < min(steps - s, 16); ++i) {
          _mm256_storeu_ps(low + (s + i) * kManyRows, _mm512_castps512_ps256(rows[i].v));
          if (count > kManyRows) {
            _mm256_storeu_ps(high + (s + i) * kManyRows, _mm512_extractf32x8_ps(rows[i].v, 1));
          }
        }
      }
    }
  });
}

// Two columns of 16 rows as pairs of bfloat16, rounded to nearest.
inline Vec pairs_of([[maybe_unused]] Vec even, [[maybe_unused]] Vec odd) {
#if defined(__AVX512BF16__)
  const __m512i low = _mm512_cvtepu16_epi32(narrow(even, BFloat16{}));
  const __m512i high = _mm512_cvtepu16_epi32(narrow(odd, BFloat16{}));
  return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
#else
  return even;
#endif
}

// A panel of 16 rows of a packed weight as numbers: panel[step * stride + 0 .. 15].
template <bool kPairs, int kBits, bool kHasMin>
inline void unpack_panel(const LinearWeight& weight, int64_t first, float* panel, int64_t stride) {
  const Scheme& scheme = weight.scheme;
  const int64_t K = weight.columns, group = scheme.group();
  const char* from = static_cast<const char*>(weight.data) + first / kPanelRows * scheme.panel_bytes(K);
  const char* codes = from + scheme.scale_bytes(K);
  for (int64_t g = 0; g < scheme.groups(K); ++g) {
    const Vec scale = load(scales_of(from, scheme, g));
    // code * scale is exact, and so is its sum with a multiple of the scale below 2^11
    Vec low = kHasMin ? load(scales_of(from, scheme, g) + 16) : scale * broadcast(kBits == 8 ? -128.f : -8.f);
    for (int64_t k = g * group; k < min((g + 1) * group, K); k += 4) {
      const __m512i bytes = _mm512_loadu_si512(codes + (kBits == 8 ? k / 4 : k / 8) * 64);
      const __m512i four = kBits == 8 ? bytes : k % 8 == 0 ? low_halves({bytes}).v : high_halves({bytes}).v;
      Vec numbers[4];
      for (int j = 0; j < 4; ++j) {
        const __m512i code =
            _mm512_and_si512(_mm512_srli_epi32(four, static_cast<unsigned>(8 * j)), _mm512_set1_epi32(255));
        numbers[j] = fma({_mm512_cvtepi32_ps(code)}, scale, low);
      }
      if constexpr (kPairs) {
        store(panel + k / 2 * stride, pairs_of(numbers[0], numbers[1]));
        if (k + 2 < K) store(panel + (k / 2 + 1) * stride, pairs_of(numbers[2], numbers[3]));
      } else {
        for (int64_t j = 0; j < min(K - k, 4); ++j) store(panel + (k + j) * stride, numbers[j]);
      }
    }
  }
}

template <bool kPairs>
[[gnu::always_inline]] inline Vec multiply_add(Vec weights, Vec activation, Vec sum) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_castps_si512(weights.v),
                             (__m512bh)_mm512_castps_si512(activation.v))};
  }
#endif
  return fma(weights, activation, sum);
}

// 8 rows of activations with V vectors of weight rows.
template <bool kPairs, int V, class T>
[[gnu::always_inline]] inline void multiply_tile(const float* x, const float* weights, int64_t steps,
                                                 int64_t rows, int64_t columns, T* out, int64_t stride) {
  Vec sums[kManyRows][V];
  for (int m = 0; m < kManyRows; ++m) {
    for (int v = 0; v < V; ++v) sums[m][v] = broadcast(0.f);
  }
  for (int64_t s = 0; s < steps; ++s) {
    Vec w[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) w[v] = load(weights + (s * V + v) * 16);
#pragma GCC unroll 8
    for (int m = 0; m < kManyRows; ++m) {
      const Vec activation = broadcast(x[s * kManyRows + m]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sums[m][v] = multiply_add<kPairs>(w[v], activation, sums[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int64_t m = 0; m < kManyRows; ++m) {
    if (m >= rows) break;
#pragma GCC unroll 3
    for (int64_t v = 0; v < V; ++v) {
      if (16 * v + 16 <= columns) {
        store(out + m * stride + 16 * v, sums[m][v]);
      } else {
        store_first(out + m * stride + 16 * v, max(columns - 16 * v, 0), sums[m][v]);
      }
    }
  }
}

inline int64_t many_columns(const ManyWork& w) { return ceil_div(w.weight.rows, 16 * kManyVectors); }

int64_t many_items(const ManyWork& w) { return ceil_div(w.num_rows, w.block) * many_columns(w); }

int64_t many_scratch(const ManyWork& w) { return (steps_of(w) + 16) * 16 * kManyVectors * 4; }

void many_run(const ManyWork& w, int64_t begin, int64_t end, void* scratch) {
  float* const panel = static_cast<float*>(scratch);
  const int64_t steps = steps_of(w), N = w.weight.rows;
  with_steps(w, [&]<bool kPairs, class T>() {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item % many_columns(w) * 16 * kManyVectors;
      const int64_t columns = min(N - n, 16 * kManyVectors), vectors = ceil_div(columns, 16);
      for (int64_t v = 0; v < vectors; ++v) {
        with_scheme(w.weight.scheme, [&]<int kBits, bool kHasMin>() {
          unpack_panel<kPairs, kBits, kHasMin>(w.weight, n + 16 * v, panel + 16 * v, 16 * vectors);
        });
      }
      const int64_t first = item / many_columns(w) * w.block;
      const int64_t last = min(first + w.block, w.num_rows);
      for (int64_t m = first; m < last; m += kManyRows) {
        const float* x = w.operand + m * steps;
        T* out = static_cast<T*>(w.out) + m * N + n;
        const int64_t rows = min(last - m, kManyRows);
        if (vectors == 3) multiply_tile<kPairs, 3>(x, panel, steps, rows, columns, out, N);
        if (vectors == 2) multiply_tile<kPairs, 2>(x, panel, steps, rows, columns, out, N);
        if (vectors == 1) multiply_tile<kPairs, 1>(x, panel, steps, rows, columns, out, N);
      }
    }
  });
}

#else
constexpr bool kHasManyRows = false;  // torch's products are faster than these would be

int64_t many_layout_items(const ManyWork&) { return 0; }
void many_layout_run(const ManyWork&, int64_t, int64_t, void*) {}
int64_t many_items(const ManyWork&) { return 0; }
int64_t many_scratch(const ManyWork&) { return 0; }
void many_run(const ManyWork&, int64_t, int64_t, void*) {}
#endif

int64_t many_layout_scratch(const ManyWork&) { return 0; }

}  // namespace
}  // namespace zinit::cpu
