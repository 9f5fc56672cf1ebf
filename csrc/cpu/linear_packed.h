// Products of a few rows with a packed weight (linear_work.h), and such a weight as numbers again.
//
// The activations of a row are rounded to 16-bit integers, group by group: x = step * n with |n| <= 32639 and
// step = max |x| / 32639 of the group. So an activation is off by at most max |x| / 65278, which is 1 / 257 of
// what 8 bits would lose, and less than bfloat16 loses for any x above 1 / 128 of the largest one. Everything
// up to the scales is then exact in 32-bit integers: 128 columns * 32639 * 255 < 2^31.
//
// A group with max |x| < 1e-30 counts as 0, and one with NaN or infinity makes the result NaN.
#pragma once
#include "linear_plain.h"
#include "linear_work.h"
#include "simd_int.h"

namespace zinit::cpu {
namespace {

// Bytes by which 4-bit codes are asked for in advance, into the level 2 cache. The processor does not see them coming:
// the scales at the front of a panel are read along with them. So scales are asked for too, which closes the gap that
// they leave among the codes. Zen 4, two threads, one row, groups of 32, GB/s of weights at K = 576 / 1536 / 2048, where
// a plain read moves 55:
//
//   nothing asked for                       20 / 19
//   codes, 4 KiB, level 1                   21 / 27 / 31
//   codes, 8 KiB, level 2                   30 / 33 / 39
//   codes and scales, 4 KiB, level 1        21 / 30 / 32
//   codes and scales, 8 KiB, level 2        41 / 46 / 41
//   codes and scales, 16 KiB, level 2       43 / 43 / 44
//
// Codes of 8 bits come as fast as a plain read when nothing is asked for (55 at K = 1536), and at 46 with 4 KiB.
constexpr int64_t kPrefetchAhead = 8192;

template <int kBits>
[[gnu::always_inline]] inline void ask_for([[maybe_unused]] const void* p, [[maybe_unused]] int64_t ahead) {
  if constexpr (kBits == 4) __builtin_prefetch(static_cast<const char*>(p) + ahead, 0, 2);
}

// What a packed weight needs of M rows.
struct IntOperand {
  uint8_t* numbers;  // [M] rows of 16-bit integers, in the order of simd_int.h
  int64_t width;     // integers from row to row
  float* steps;      // [M, groups]
  float* sums;       // [M, groups]: the sum of the group's activations, after rounding
  // [M, groups]: -8 times the same in steps, for codes of 4 bits whose 8 stands for 0; 16 times that for 8 bits
  int32_t* starts;
};

// One row, K floats with room for whole groups of them; the padding is written.
inline void quantise_row(float* x, int64_t K, int64_t group, uint8_t* numbers, float* steps, float* sums,
                         int32_t* starts) {
  const int64_t padded = round_up(K, group);
  for (int64_t k = K; k < padded; ++k) x[k] = 0.f;
  for (int64_t g = 0; g * group < padded; ++g, x += group, numbers += 2 * group) {
    Vec largest = broadcast(0.f), zeros = broadcast(0.f);
    for (int64_t k = 0; k < group; k += kLanes) {
      const Vec v = load(x + k);
      largest = max(largest, abs(v)), zeros = fma(v, broadcast(0.f), zeros);
    }
    const float most = reduce_max(largest);
    const bool finite = reduce_add(zeros) == 0.f, tiny = most < 1e-30f;  // 0 * inf and 0 * NaN are NaN
    const float inverse = tiny || !finite ? 0.f : static_cast<float>(kMostSteps) / most;
    // Rounded, in steps. Sums of up to 128 of them are below 2^24 and so exact as floats.
    float rounded[128];
    Vec sum = broadcast(0.f);
    for (int64_t k = 0; k < group; k += kLanes) {
      const Vec n = finite ? round_nearest(load(x + k) * broadcast(inverse)) : broadcast(0.f);
      store(rounded + k, n);
      sum = sum + n;
    }
    store_activations(rounded, group, numbers);
    const auto total = static_cast<int32_t>(reduce_add(sum));
    steps[g] = !finite ? __builtin_nanf("") : tiny ? 0.f : most / static_cast<float>(kMostSteps);
    sums[g] = steps[g] * static_cast<float>(total);
    starts[g] = -8 * total;
  }
}

inline const Float16* scales_of(const char* panel, const Scheme& scheme, int64_t g) {
  return reinterpret_cast<const Float16*>(panel) + g * (scheme.has_min() ? 32 : 16);
}

// One panel against M rows: sums[m * stride + 0 .. 15].
template <int kBits, bool kHasMin, int M>
[[gnu::always_inline]] inline void multiply_panel(const char* panel, const Scheme& scheme, int64_t K,
                                                  const IntOperand& x, float* sums, int64_t stride) {
  constexpr int kChains = M <= 2 ? 2 : 1;  // independent sums: one instruction waits for the last
  const int64_t groups = scheme.groups(K), group = scheme.group(), width = x.width;
  const int64_t bytes = scheme.panel_bytes(K);
  const char* codes = panel + scheme.scale_bytes(K);
  Vec found[M][kParts];
  for (int m = 0; m < M; ++m) {
    for (int part = 0; part < kParts; ++part) found[m][part] = broadcast(0.f);
  }
  for (int64_t g = 0; g < groups; ++g) {
    Sums acc[M][kChains];
    for (int m = 0; m < M; ++m) {
      if constexpr (!kHasMin) acc[m][0].start((kBits == 8 ? 16 : 1) * x.starts[m * groups + g]);
    }
    const uint8_t* numbers = x.numbers + 2 * g * group;
    for (int64_t k = 0; k < group; k += 8) {
      Quads quads[2];
      quads[0] = load_quads(codes);
      ask_for<kBits>(codes, kPrefetchAhead);
      if constexpr (kBits == 8) {
        quads[1] = load_quads(codes + 64);
        codes += 128;
      } else {
        quads[1] = high_halves(quads[0]), quads[0] = low_halves(quads[0]);
        codes += 64;
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        acc[m][0].add(quads[0], numbers + 2 * (m * width + k));
        acc[m][kChains - 1].add(quads[1], numbers + 2 * (m * width + k + 4));
      }
    }
    const Float16* scales = scales_of(panel, scheme, g);
    ask_for<kBits>(scales, bytes + kPrefetchAhead);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Ints total = acc[m][0].total();
      if constexpr (kChains == 2) total = add(total, acc[m][1].total());
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
  const int64_t K = weight.columns, groups = scheme.groups(K);
  const int64_t bytes = scheme.panel_bytes(K);
  with_scheme(scheme, [&]<int kBits, bool kHasMin>() {
    for (int64_t n = 0; n < count; n += kPanelRows) {
      const char* panel = static_cast<const char*>(weight.data) + (first + n) / kPanelRows * bytes;
      for (int64_t m = 0; m < rows; m += kPackedRowBlock) {
        const IntOperand part = {x.numbers + 2 * m * x.width, x.width, x.steps + m * groups,
                                 x.sums + m * groups, x.starts + m * groups};
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
      const auto* at = reinterpret_cast<const uint8_t*>(codes) + k * 2 * kBits + 4 * lane;
      for (int64_t i = 0; i < 8; ++i) {
        if constexpr (kBits == 8) {
          to[k + i] = scale * static_cast<float>(at[i / 4 * 64 + i % 4] - 128);
        } else {
          const int code = at[i % 4] >> (i / 4 * 4) & 15;
          to[k + i] = kHasMin ? scale * static_cast<float>(code) + low : scale * static_cast<float>(code - 8);
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
