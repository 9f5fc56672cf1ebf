// What the matrix products are made of. A unit is the 4 bytes that one multiply-accumulate consumes from each
// operand: one float (FloatTile), or two bfloat16 neighbours along the reduction (Bf16Tile, with
// AVX512_BF16). The kernels are written once on units. Only packing and a few element-wise stores know which
// of the two it is.
//
// The instruction behind Bf16Tile (vdpbf16ps) counts numbers below 2^-126 as 0: bfloat16 inputs, products and
// sums. Extremes finds the results that this can have changed; they are computed again with FloatTile.
//
// Packed forms of a [rows, D] operand, padded with zeros to whole vectors and pairs:
//   rows        [row][D / kPack] units      reduced along D, one unit of a row broadcast at a time
//   transposed  [D / kPack][strip] units    reduced along D, its rows in lanes
//   lanes       [row / kPack][D] units      reduced along the rows, D in lanes
#pragma once
#include "../params.h"
#include "simd.h"

namespace zinit::cpu {
namespace {

constexpr int kLanes = Vec::kLanes;
constexpr int kStrip = 2 * kLanes;  // queries that are worked on together, one to a lane

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of one head: `data` is row 0, `stride` in elements.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t i) const { return data + i * stride; }
  Rows from(int64_t i) const { return {data + i * stride, stride}; }
};

// f.operator()<T>() for the element type T that `dtype` names. What names none ends the process: the bindings
// let no other number through.
template <class F>
inline void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f.template operator()<float>();
    case DType::kBFloat16:
      return f.template operator()<BFloat16>();
    case DType::kFloat16:
      return f.template operator()<Float16>();
  }
  __builtin_trap();
}

// f(rows) with Rows of the element type that `dtype` names.
template <class F>
inline void visit_rows(void* data, int64_t stride, DType dtype, F f) {
  with_dtype(dtype, [&]<class T>() { f(Rows<T>{static_cast<T*>(data), stride}); });
}

// Lanes d .. d + kLanes of a row of length D, zero from D on.
template <class T>
inline Vec load_columns(const T* row, int64_t d, int64_t D) {
  return d + kLanes <= D ? load(row + d) : load_first(row + d, D - d);
}

// scale times a padded row, as a row of length D.
template <class T>
inline void store_columns(const float* from, Vec scale, int64_t D, T* row) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) store(row + d, load(from + d) * scale);
  if (d < D) store_first(row + d, D - d, load(from + d) * scale);
}

// A key whose bias is -inf takes part in nothing. It is packed as zeros, so that NaN in padding does not
// spread.
inline bool hidden(const float* bias, int64_t j) { return bias != nullptr && bias[j] == -kInfinity; }

struct FloatTile {
  using Unit = float;
  using UnitVec = Vec;
  static constexpr int kPack = 1;
  static constexpr bool kFlushes = false;

  static Vec load_units(const Unit* p) { return load(p); }
  static Vec multiply_add(Unit a, Vec b, Vec sum) { return fma(broadcast(a), b, sum); }
  template <class T>
  static void store_result(T* to, Vec x) {
    store(to, x);
  }

  template <class T>
  [[gnu::always_inline]] static void pack_rows(Rows<T> from, int64_t rows, int64_t D, const float* bias,
                                               Unit* to) {
    const int64_t width = round_up(D, kLanes);
    for (int64_t i = 0; i < rows; ++i, to += width) {
      const bool zero = hidden(bias, i);
      for (int64_t d = 0; d < D; d += kLanes)
        store(to + d, zero ? broadcast(0.f) : load_columns(from[i], d, D));
    }
  }
  template <class T>
  [[gnu::always_inline]] static void pack_lanes(Rows<T> from, int64_t rows, int64_t D, const float* bias,
                                                Unit* to) {
    pack_rows(from, rows, D, bias, to);
  }
  template <class T>
  static void pack_transposed(Rows<T> from, int64_t rows, int64_t D, Unit* to) {
    for (int64_t first = 0; first < kStrip; first += kLanes) {
      for (int64_t d = 0; d < D; d += kLanes) {
        Vec block[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) {
          block[i] = first + i < rows ? load_columns(from[first + i], d, D) : broadcast(0.f);
        }
        transpose(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) store(to + (d + i) * kStrip + first, block[i]);
      }
    }
  }
};

#if defined(__AVX512BF16__)
struct Bf16Tile {
  using Unit = uint32_t;
  using UnitVec = __m512bh;
  static constexpr int kPack = 2;
  static constexpr bool kFlushes = true;

  static UnitVec load_units(const Unit* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Vec multiply_add(Unit a, UnitVec b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), b)};
  }

  template <class T>
  static void store_result(T* to, Vec x) {
    if constexpr (sizeof(T) == 2) {  // out has the dtype of the query, bfloat16
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow_operand(x));
    } else {
      store(to, x);
    }
  }

  static __m256i load_narrow(const BFloat16* row, int64_t d, int64_t D) {
    return d + kLanes <= D ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d))
                           : _mm256_maskz_loadu_epi16(first(D - d), row + d);
  }
  template <class T>
  static __m256i load_narrow(const T* row, int64_t d, int64_t D) {
    return narrow_operand(load_columns(row, d, D));
  }
  // Two rows, one above the other, as units.
  static __m512i interleave(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }

  template <class T>
  [[gnu::always_inline]] static void pack_rows(Rows<T> from, int64_t rows, int64_t D, const float* bias,
                                               Unit* to) {
    const int64_t width = round_up(D, kLanes) / 2;
    for (int64_t i = 0; i < round_up(rows, 2); ++i, to += width) {
      const bool zero = i >= rows || hidden(bias, i);
      for (int64_t d = 0; d < D; d += kLanes) {
        const __m256i x = zero ? _mm256_setzero_si256() : load_narrow(from[i], d, D);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d / 2), x);
      }
    }
  }
  template <class T>
  [[gnu::always_inline]] static void pack_lanes(Rows<T> from, int64_t rows, int64_t D, const float* bias,
                                                Unit* to) {
    const int64_t width = round_up(D, kLanes);
    for (int64_t i = 0; i < rows; i += 2, to += width) {
      const bool zero = hidden(bias, i), last = i + 1 >= rows || hidden(bias, i + 1);
      for (int64_t d = 0; d < D; d += kLanes) {
        const __m256i low = zero ? _mm256_setzero_si256() : load_narrow(from[i], d, D);
        const __m256i high = last ? _mm256_setzero_si256() : load_narrow(from[i + 1], d, D);
        _mm512_storeu_si512(to + d, interleave(low, high));
      }
    }
  }
  template <class T>
  static void pack_transposed(Rows<T> from, int64_t rows, int64_t D, Unit* to) {
    for (int64_t first_row = 0; first_row < kStrip; first_row += kLanes) {
      for (int64_t d = 0; d < D; d += 2 * kLanes) {
        Vec block[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t row = first_row + i;
          __m512i x = _mm512_setzero_si512();
          if (row < rows) {
            x = _mm512_castsi256_si512(load_narrow(from[row], d, D));
            if (d + kLanes < D)
              x = _mm512_inserti64x4(x, load_narrow(from[row], d + kLanes, D), 1);
            else
              x = _mm512_zextsi256_si512(_mm512_castsi512_si256(x));
          }
          block[i].v = _mm512_castsi512_ps(x);
        }
        transpose(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) {
          _mm512_storeu_si512(to + (d / 2 + i) * kStrip + first_row, _mm512_castps_si512(block[i].v));
        }
      }
    }
  }

  // Neighbouring rows of a [keys][queries] tile as units reduced along the keys.
  static void store_key_pair(Unit* to, Vec even, Vec odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, halves));
  }
  // One row of it as units reduced along the queries.
  static void store_query_pairs(Unit* to, Vec row) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow_operand(row));
  }
};
#endif

// f(Tile): bfloat16 units where the processor multiplies them and q, k, v are bfloat16, floats otherwise.
template <class F>
inline void with_tile([[maybe_unused]] const View& query, F f) {
#if defined(__AVX512BF16__)
  if (query.dtype == DType::kBFloat16) return f(Bf16Tile{});
#endif
  f(FloatTile{});
}

// The bytes of a Scratch<Tile>: of the larger one, since an item may have to be repeated in floats.
template <template <class> class Scratch, class Work>
int64_t scratch_of_tiles(const Work& w) {
  int64_t bytes = Scratch<FloatTile>(w, nullptr).bytes;
  with_tile(w.query, [&](auto tile) { bytes = max(bytes, Scratch<decltype(tile)>(w, nullptr).bytes); });
  return bytes;
}

}  // namespace
}  // namespace zinit::cpu
