// Products of a few rows with a packed weight (linear_work.h), and such a weight as numbers again.
//
// The activations of a row are rounded to 16-bit integers, group by group: x = step * n with |n| <= 32767 and
// step = max |x| / 32767 of the group. So an activation is off by at most max |x| / 65534, which is 1 / 256 of
// what 8 bits would lose, and less than bfloat16 loses for any x above 1 / 128 of the largest one. Everything
// up to the scales is then exact in 32-bit integers: 128 columns * 32767 * 128 < 2^31.
//
// A group with max |x| < 1e-30 counts as 0, and one with NaN or infinity makes the result NaN.
#pragma once
#include "linear_plain.h"
#include "linear_work.h"
#include "simd_int.h"

namespace zinit::cpu {
namespace {

// What a packed weight needs of M rows.
struct IntOperand {
  int16_t* numbers;  // [M, groups * group]
  float* steps;      // [M, groups]
  float* sums;       // [M, groups]: the sum of the group's activations, after rounding
  int32_t* totals;   // [M, groups]: the same, in steps
};

// One row, K floats with room for whole groups of them; the padding is written.
inline void quantise_row(float* x, int64_t K, int64_t group, int16_t* numbers, float* steps, float* sums,
                         int32_t* totals) {
  const int64_t padded = round_up(K, group);
  for (int64_t k = K; k < padded; ++k) x[k] = 0.f;
  for (int64_t g = 0; g * group < padded; ++g, x += group, numbers += group) {
    // the largest as integers: then NaN is the largest of all
    uint32_t largest = 0;
    for (int64_t k = 0; k < group; ++k) {
      const uint32_t size = bits_of(x[k]) & 0x7fffffff;
      largest = size > largest ? size : largest;
    }
    const float most = float_of(largest);
    const bool tiny = most < 1e-30f, finite = largest < 0x7f800000;
    const float inverse = tiny || !finite ? 0.f : 32767.f / most;
    int32_t total = 0;
    float rounded[128];
    for (int64_t k = 0; k < group; k += kLanes) {
      store(rounded + k, finite ? round_nearest(load(x + k) * broadcast(inverse)) : broadcast(0.f));
    }
    for (int64_t k = 0; k < group; ++k) {
      const int32_t n = static_cast<int32_t>(rounded[k]);
      numbers[k] = static_cast<int16_t>(n);
      total += n;
    }
    steps[g] = !finite ? __builtin_nanf("") : tiny ? 0.f : most / 32767.f;
    sums[g] = steps[g] * static_cast<float>(total);
    totals[g] = total;
  }
}

inline const Float16* scales_of(const char* panel, const Scheme& scheme, int64_t g) {
  return reinterpret_cast<const Float16*>(panel) + g * (scheme.has_min() ? 32 : 16);
}

// One panel against M rows: sums[m * stride + 0 .. 15].
template <int kBits, bool kHasMin, int M>
[[gnu::always_inline]] inline void multiply_panel(const char* panel, const Scheme& scheme, int64_t K,
                                                  const IntOperand& x, float* sums, int64_t stride) {
  constexpr int kChains = M == 1   ? 4
                          : M == 2 ? 2
                                   : 1;  // independent sums: one instruction waits for the last
  const int64_t groups = scheme.groups(K), group = scheme.group(), width = groups * group;
  const char* codes = panel + scheme.scale_bytes(K);
  Vec found[M][kParts];
  for (int m = 0; m < M; ++m) {
    for (int part = 0; part < kParts; ++part) found[m][part] = broadcast(0.f);
  }
  for (int64_t g = 0; g < groups; ++g) {
    Ints acc[M][kChains];
    for (int m = 0; m < M; ++m) {
      for (int c = 0; c < kChains; ++c) acc[m][c] = zero_ints();
    }
    const int16_t* numbers = x.numbers + g * group;
    for (int64_t k = 0; k < group; k += 8) {
      Pairs pairs[4];
      if constexpr (kBits == 8) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) pairs[j] = load_bytes(reinterpret_cast<const int8_t*>(codes) + 32 * j);
        __builtin_prefetch(codes + 1024), __builtin_prefetch(codes + 1088);
        codes += 128;
      } else {
        const Ints words = load_words(codes);
        __builtin_prefetch(codes + 1024);
        codes += 64;
        pairs[0] = nibbles<0>(words), pairs[1] = nibbles<1>(words), pairs[2] = nibbles<2>(words);
        pairs[3] = nibbles<3>(words);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          acc[m][j % kChains] = dot(acc[m][j % kChains], pairs[j], numbers + m * width + k + 2 * j);
        }
      }
    }
    const Float16* scales = scales_of(panel, scheme, g);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Ints total = acc[m][0];
      for (int c = 1; c < kChains; ++c) total = add(total, acc[m][c]);
      if constexpr (kBits == 4 && !kHasMin) total = subtract(total, 8 * x.totals[m * groups + g]);
      const Vec step = broadcast(x.steps[m * groups + g]);
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        found[m][part] = fma(to_floats(total, part), load(scales + part * kLanes) * step, found[m][part]);
        if constexpr (kHasMin) {
          found[m][part] =
              fma(load(scales + 16 + part * kLanes), broadcast(x.sums[m * groups + g]), found[m][part]);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int part = 0; part < kParts; ++part) store(sums + m * stride + part * kLanes, found[m][part]);
  }
}

template <class F>
inline void with_scheme(const Scheme& scheme, F f) {
  if (scheme.bits() == 8) return f.template operator()<8, false>();
  if (scheme.has_min()) return f.template operator()<4, true>();
  f.template operator()<4, false>();
}

// Rows that meet a pair of columns while it is in a register.
constexpr int kPackedRowBlock = Vec::kLanes == 16 ? 8 : 4;

// Panels first / 16 ... that hold `count` weight rows from `first` on (a multiple of 16); `sums` has room for
// whole panels.
inline void multiply_packed(const LinearWeight& weight, int64_t first, int64_t count, const IntOperand& x,
                            int64_t rows, float* sums, int64_t stride) {
  const Scheme& scheme = weight.scheme;
  const int64_t K = weight.columns, groups = scheme.groups(K), width = groups * scheme.group();
  const int64_t bytes = scheme.panel_bytes(K);
  with_scheme(scheme, [&]<int kBits, bool kHasMin>() {
    for (int64_t n = 0; n < count; n += kPanelRows) {
      const char* panel = static_cast<const char*>(weight.data) + (first + n) / kPanelRows * bytes;
      for (int64_t m = 0; m < rows; m += kPackedRowBlock) {
        const IntOperand part = {x.numbers + m * width, x.steps + m * groups, x.sums + m * groups,
                                 x.totals + m * groups};
        with_rows(min(rows - m, kPackedRowBlock), [&]<int M>() {
          if constexpr (M <= kPackedRowBlock) {
            multiply_panel<kBits, kHasMin, M>(panel, scheme, K, part, sums + m * stride + n, stride);
          }
        });
      }
    }
  });
}

// Weight row n as floats; room for whole groups.
template <int kBits, bool kHasMin>
inline void unpack_row(const LinearWeight& weight, int64_t n, float* to) {
  const Scheme& scheme = weight.scheme;
  const int64_t K = weight.columns, group = scheme.group(), lane = n % kPanelRows;
  const char* panel = static_cast<const char*>(weight.data) + n / kPanelRows * scheme.panel_bytes(K);
  const char* codes = panel + scheme.scale_bytes(K);
  for (int64_t g = 0; g < scheme.groups(K); ++g) {
    const float scale = to_float(scales_of(panel, scheme, g)[lane]);
    const float low = kHasMin ? to_float(scales_of(panel, scheme, g)[16 + lane]) : 0.f;
    for (int64_t k = g * group; k < (g + 1) * group; k += 8) {
      if constexpr (kBits == 8) {
        const int8_t* at = reinterpret_cast<const int8_t*>(codes) + k * 16 + 2 * lane;
        for (int j = 0; j < 8; ++j) to[k + j] = scale * at[j / 2 * 32 + j % 2];
      } else {
        uint32_t word;
        __builtin_memcpy(&word, codes + k * 8 + 4 * lane, 4);
        for (int j = 0; j < 8; ++j) {
          const int code = static_cast<int>(word >> (j / 2 * 4 + j % 2 * 16) & 15);
          to[k + j] = kHasMin ? scale * static_cast<float>(code) + low : scale * static_cast<float>(code - 8);
        }
      }
    }
  }
}

int64_t unpack_items(const UnpackWork& w) { return ceil_div(w.num_rows, kPanelRows); }

int64_t unpack_scratch(const UnpackWork& w) { return round_up(w.weight.columns, 128) * 4; }

void unpack_run(const UnpackWork& w, int64_t begin, int64_t end, void* scratch) {
  float* row = static_cast<float*>(scratch);
  const int64_t K = w.weight.columns;
  with_dtype(w.dtype, [&]<class T>() {
    with_scheme(w.weight.scheme, [&]<int kBits, bool kHasMin>() {
      for (int64_t i = begin * kPanelRows; i < min(end * kPanelRows, w.num_rows); ++i) {
        unpack_row<kBits, kHasMin>(w.weight, w.indices != nullptr ? w.indices[i] : i, row);
        store_columns(row, broadcast(1.f), K, static_cast<T*>(w.out) + i * K);
      }
    });
  });
}

}  // namespace
}  // namespace zinit::cpu
