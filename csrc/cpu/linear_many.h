// Products of many rows: a prompt's pass. Bound by arithmetic, so the rows of a weight are laid out as the
// multiplications take them, 48 of them at a time in a thread's scratch: the weight is never there a second time.
//
// A step is one column in float32, or two neighbouring ones in bfloat16 (vdpbf16ps); it fills 32 bits of a row. The rows
// of the weight lie in lanes, in panels [steps][16], [steps][32] or [steps][48]. A step of an activation is broadcast
// from its row, as that lies in memory.
//
// 8 rows and 3 vectors of weights are 24 sums, which leaves registers for 3 weights and some activations.
#pragma once
#include "kernels.h"
#include "linear.h"

namespace zinit::cpu {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
constexpr bool kHasManyRows = true;

constexpr int64_t kManyRows = 8, kManyVectors = 3, kManyColumns = 16 * kManyVectors;
constexpr int64_t kStepBytes = 4;
constexpr int64_t kFloatsAhead = 512;  // of a panel, which comes from the level 2 cache

inline bool in_pairs(const ManyWork& w) { return multiplies_bfloat16(w.dtype); }
inline int64_t columns_of(const ManyWork& w) { return w.weights[0].columns; }
inline int64_t steps_of(const ManyWork& w) {
  return in_pairs(w) ? ceil_div(columns_of(w), 2) : columns_of(w);
}

// f(kPairs, T) for the element type of a work's tensors.
template <class F>
inline void with_steps(const ManyWork& w, F f) {
  with_dtype(w.dtype, [&]<class T>() {
#if defined(__AVX512BF16__)
    if constexpr (__is_same(T, BFloat16)) return f.template operator()<true, Bf16Operand>();
#endif
    f.template operator()<false, T>();
  });
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

// A panel of up to 16 rows of a plain weight: panel[step * stride + 0 .. 15]. Writes whole groups of 16 steps.
template <bool kPairs, class T>
inline void layout_panel(const LinearWeight& weight, int64_t first, float* panel, int64_t stride) {
  const int64_t K = weight.columns, steps = kPairs ? ceil_div(K, 2) : K;
  const int64_t count = min(weight.rows - first, 16);
  const T* from = static_cast<const T*>(weight.data) + first * K;
  for (int64_t s = 0; s < steps; s += 16) {
    Vec rows[16];
    for (int64_t n = 0; n < 16; ++n) {
      rows[n] = n < count ? steps_at<kPairs>(from + n * K, kPairs ? 2 * s : s, K) : broadcast(0.f);
    }
    transpose(rows);
    for (int64_t i = 0; i < 16; ++i) store(panel + (s + i) * stride, rows[i]);
  }
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

// sums[m * 48 + n] of 8 rows of activations, `row_bytes` apart, with V vectors of weight rows.
template <bool kPairs, int V>
[[gnu::noinline]] void multiply_tile(const char* x, int64_t row_bytes, const float* weights, int64_t steps,
                                     float* to) {
  Vec sums[kManyRows][V];
  for (int m = 0; m < kManyRows; ++m) {
    for (int v = 0; v < V; ++v) sums[m][v] = broadcast(0.f);
  }
  for (int64_t s = 0; s < steps; ++s) {
    Vec w[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      w[v] = load(weights + (s * V + v) * 16);
      __builtin_prefetch(weights + (s * V + v) * 16 + kFloatsAhead);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kManyRows; ++m) {
      float step;
      __builtin_memcpy(&step, x + m * row_bytes + s * kStepBytes, sizeof(step));
      const Vec activation = broadcast(step);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sums[m][v] = multiply_add<kPairs>(w[v], activation, sums[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kManyRows; ++m) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) store(to + m * kManyColumns + 16 * v, sums[m][v]);
  }
}

// A thread's scratch.
struct ManyScratch {
  float* panels[2];  // [steps][columns] of weight rows; the second one where gated
  float* sums[2];    // [8][48]
  char* rows;        // [8] rows of activations
  int64_t row_bytes;
  int64_t bytes;

  ManyScratch(const ManyWork& w, void* memory) : panels{}, sums{} {
    Arena arena{static_cast<char*>(memory)};
    for (int i = 0; i < (w.gated ? 2 : 1); ++i) {
      panels[i] = arena.take<float>(round_up(steps_of(w), 16) * kManyColumns);
      sums[i] = arena.take<float>(kManyRows * kManyColumns);
    }
    row_bytes = round_up(steps_of(w), 16) * kStepBytes;
    rows = arena.take<char>(kManyRows * row_bytes);
    bytes = arena.used;
  }
};

int64_t many_scratch(const ManyWork& w) { return ManyScratch(w, nullptr).bytes; }

inline int64_t many_blocks(const ManyWork& w) { return ceil_div(w.num_rows, w.block); }

int64_t many_items(const ManyWork& w) {
  int64_t panels = 0;
  for (int i = 0; i < (w.gated ? 1 : w.num_weights); ++i) panels += ceil_div(w.weights[i].rows, kManyColumns);
  return panels * many_blocks(w);
}

// Some rows of the input as the multiplications read them.
struct Activations {
  const char* data;
  int64_t row_bytes;
};

// 8 rows from m on. They are copied where they are of another type, end within a pair, or are fewer; rows past the last
// one are then the last one again.
template <bool kPairs, class T>
inline Activations activations(const ManyWork& w, const ManyScratch& s, int64_t m, int64_t rows) {
  const int64_t K = columns_of(w);
  const T* from = static_cast<const T*>(w.input) + m * K;
  constexpr bool kSameType = kPairs || __is_same(T, float);
  if (kSameType && rows == kManyRows && (!kPairs || K % 2 == 0)) {
    return {reinterpret_cast<const char*>(from), K * static_cast<int64_t>(sizeof(T))};
  }
  for (int64_t i = 0; i < kManyRows; ++i) {
    const T* row = from + min(i, rows - 1) * K;
    float* to = reinterpret_cast<float*>(s.rows + i * s.row_bytes);
    for (int64_t step = 0; step < steps_of(w); step += 16) {
      store(to + step, steps_at<kPairs>(row, kPairs ? 2 * step : step, K));
    }
  }
  return {s.rows, s.row_bytes};
}

// One item: a block of rows with up to 48 rows of a weight, or of two.
template <bool kPairs, class T>
inline void many_item(const ManyWork& w, const ManyScratch& s, int64_t item) {
  const int64_t block = item % many_blocks(w);
  int64_t panel = item / many_blocks(w);
  int i = 0;
  if (!w.gated) {
    for (int64_t panels; panel >= (panels = ceil_div(w.weights[i].rows, kManyColumns)); ++i) panel -= panels;
  }
  const int64_t first = panel * kManyColumns, steps = steps_of(w);
  const int64_t count = min(w.weights[i].rows - first, kManyColumns), vectors = ceil_div(count, 16);
  const int factors = w.gated ? 2 : 1;
  for (int f = 0; f < factors; ++f) {
    const LinearWeight& weight = w.weights[i + f];
    for (int64_t v = 0; v < vectors; ++v) {
      float* to = s.panels[f] + 16 * v;
      if (weight.scheme.packed()) {
        with_scheme(weight.scheme, [&]<int kBits, bool kHasMin>() {
          unpack_panel<kPairs, kBits, kHasMin>(weight, first + 16 * v, to, 16 * vectors);
        });
      } else {
        layout_panel<kPairs, T>(weight, first + 16 * v, to, 16 * vectors);
      }
    }
  }
  // the rows that follow in memory are this thread's next ones
  const int64_t bytes = row_bytes(w.weights[i]) * count;
  const int64_t last = min((block + 1) * w.block, w.num_rows);
  const int64_t share =
      block + 1 == many_blocks(w) ? ceil_div(bytes, ceil_div(last - block * w.block, kManyRows)) : 0;
  int64_t asked = row_bytes(w.weights[i]) * (first + count);
  for (int64_t m = block * w.block; m < last; m += kManyRows, asked += share) {
    const int64_t rows = min(last - m, kManyRows);
    const Activations x = activations<kPairs, T>(w, s, m, rows);
    for (int f = 0; f < factors; ++f) {
      for (int64_t at = 0; at < share; at += 64) {
        __builtin_prefetch(static_cast<const char*>(w.weights[i + f].data) + asked + at, 0, 2);
      }
      if (vectors == 3) multiply_tile<kPairs, 3>(x.data, x.row_bytes, s.panels[f], steps, s.sums[f]);
      if (vectors == 2) multiply_tile<kPairs, 2>(x.data, x.row_bytes, s.panels[f], steps, s.sums[f]);
      if (vectors == 1) multiply_tile<kPairs, 1>(x.data, x.row_bytes, s.panels[f], steps, s.sums[f]);
    }
    for (int64_t r = 0; r < rows; ++r) {
      finish_row<T>(w, i, m + r, first, count, s.sums[0] + r * kManyColumns, s.sums[1] + r * kManyColumns);
    }
  }
}

void many_run(const ManyWork& w, int64_t begin, int64_t end, void* memory) {
  const ManyScratch s(w, memory);
  with_steps(w, [&]<bool kPairs, class T>() {
    for (int64_t item = begin; item < end; ++item) many_item<kPairs, T>(w, s, item);
  });
}

#else
constexpr bool kHasManyRows = false;  // torch's products are faster than these would be

int64_t many_items(const ManyWork&) { return 0; }
int64_t many_scratch(const ManyWork&) { return 0; }
void many_run(const ManyWork&, int64_t, int64_t, void*) {}
#endif

}  // namespace
}  // namespace zinit::cpu
