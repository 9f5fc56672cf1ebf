// The arithmetic of decoding: one tile of query rows against a block of keys and values that are known by
// their addresses.
//
// Lanes run along the head dimension. kLanes dot products are summed across their lanes together
// (transpose_add). Scores are kept as [key][row of the tile], so that the softmax of a tile is vertical
// whatever its number of rows. The letters m, l, acc, p and alpha are those of softmax.h.
#pragma once
#include "simd.h"
#include "tiles.h"
#include "work.h"

namespace zinit::cpu {
namespace {

constexpr int64_t kTileRows =
    4;  // rows of a tile share each load of a key or value; tiles have 4, 2 or 1 rows

template <int N>
struct TileOf {
  static constexpr int kRows = N;
};

// f(TileOf<N>, first row, number of the tile) for rows cut into tiles.
template <class F>
inline void for_each_tile(int64_t rows, F&& f) {
  int64_t row = 0, tile = 0;
  for (; row + 4 <= rows; row += 4) f(TileOf<4>{}, row, tile++);
  if (row + 2 <= rows) {
    f(TileOf<2>{}, row, tile++);
    row += 2;
  }
  if (row < rows) f(TileOf<1>{}, row, tile);
}

inline int64_t tiles_of(int64_t rows) { return rows / 4 + 2; }

// One vector's worth of a key against a row of the query, which lies in scratch as `Query` elements. kFloats:
// as floats, where vdpbf16ps would count small numbers as 0 (special.h).
template <class T, bool kFloats>
struct Dot {
  using Query = float;
  static constexpr bool kPairs = false;
  static constexpr int kStep = kLanes;
  using Key = Vec;
  static Key load_key(const T* key) { return load(key); }
  static Key load_key(const T* key, int64_t n) { return load_first(key, n); }
  static Vec accumulate(Key key, const Query* query, Vec sum) { return fma(key, load(query), sum); }
};

#if defined(__AVX512BF16__)
// bfloat16 by bfloat16 in pairs, summed in float32.
template <>
struct Dot<BFloat16, false> {
  using Query = BFloat16;
  static constexpr bool kPairs = true;
  static constexpr int kStep = 2 * kLanes;
  using Key = __m512i;
  static Key load_key(const BFloat16* key) { return _mm512_loadu_si512(key); }
  static Key load_key(const BFloat16* key, int64_t n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), key);
  }
  static Vec accumulate(Key key, const Query* query, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)key, (__m512bh)_mm512_loadu_si512(query))};
  }
  // `padded` floats of a query, as the operand; behind them zeros, up to a whole step.
  static void store_query(const float* from, int64_t padded, Query* to) {
    for (int64_t d = 0; d < padded; d += kLanes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), narrow_operand(load(from + d)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + padded), _mm256_setzero_si256());
  }
};
#endif

using RowAddress = const char*;

// Into the level 2 cache: at 8192 keys decoding then takes 0.95 to 1.1 of a plain read of the cache. Into
// level 1 it takes 1.1 to 2.7, without any prefetch 1.1 to 3.6 (Zen 4, two threads).
inline void prefetch(RowAddress address) { __builtin_prefetch(address, 0, 2); }

// scores[j][r] = scale * keys[j] . query[r] for `count` keys, a multiple of kLanes. `coming` is prefetched
// row by row.
template <class T, bool kFloats, int N>
inline void score_keys(const RowAddress* keys, int64_t count, int64_t head_dim,
                       const typename Dot<T, kFloats>::Query* query, int64_t query_stride, float scale,
                       float* scores, const RowAddress* coming) {
  // Keys walked together: 2 load each query too often (f32 +14 %), more run out of registers for addresses.
  constexpr int kKeys = kLanes / N, kTogether = kKeys < 4 ? kKeys : 4;
  using KeyDot = Dot<T, kFloats>;
  for (int64_t j = 0; j < count; j += kKeys) {
    const T* key[kKeys];
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) {
      key[k] = reinterpret_cast<const T*>(keys[j + k]);
    }
    Vec sums[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] = broadcast(0.f);
#pragma GCC unroll 16
    for (int first = 0; first < kKeys; first += kTogether) {
      int64_t d = 0;
      for (; d + KeyDot::kStep <= head_dim; d += KeyDot::kStep) {
#pragma GCC unroll 16
        for (int k = first; k < first + kTogether; ++k) {
          if (coming) prefetch(coming[j + k] + d * static_cast<int64_t>(sizeof(T)));
          const auto x = KeyDot::load_key(key[k] + d);
#pragma GCC unroll 4
          for (int r = 0; r < N; ++r) {
            sums[k * N + r] = KeyDot::accumulate(x, query + r * query_stride + d, sums[k * N + r]);
          }
        }
      }
      if (d < head_dim) {
#pragma GCC unroll 16
        for (int k = first; k < first + kTogether; ++k) {
          const auto x = KeyDot::load_key(key[k] + d, head_dim - d);
#pragma GCC unroll 4
          for (int r = 0; r < N; ++r) {
            sums[k * N + r] = KeyDot::accumulate(x, query + r * query_stride + d, sums[k * N + r]);
          }
        }
      }
    }
    store(scores + j * N, broadcast(scale) * transpose_add(sums));
  }
}

// acc[r][d ..] += sum_j p[j][r] * values[j][d ..] for C vectors from d on.
template <class T, int N, int C>
inline void add_value_columns(const RowAddress* values, int64_t count, const float* p, float* acc,
                              int64_t acc_stride, int64_t d, const RowAddress* coming) {
  Vec sums[N][C];
#pragma GCC unroll 4
  for (int r = 0; r < N; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c] = load(acc + r * acc_stride + d + c * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
    if (coming) {
      for (int i = 0; i < C * kLanes * static_cast<int>(sizeof(T)); i += 64) {
        prefetch(coming[j] + d * static_cast<int64_t>(sizeof(T)) + i);
      }
    }
    const T* value = reinterpret_cast<const T*>(values[j]) + d;
    Vec x[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) x[c] = load(value + c * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) {
      const Vec weight = broadcast(p[j * N + r]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] = fma(weight, x[c], sums[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < N; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(acc + r * acc_stride + d + c * kLanes, sums[r][c]);
  }
}

// acc[r] += sum_j p[j][r] * values[j]; rows of acc are padded to whole vectors.
template <class T, int N>
inline void add_values(const RowAddress* values, int64_t count, int64_t head_dim, const float* p, float* acc,
                       int64_t acc_stride, const RowAddress* coming) {
  constexpr int kSums = kLanes == 16 ? 16 : 8;  // half of the registers
  constexpr int kWide = kSums / N < 8 ? kSums / N : 8;
  int64_t d = 0;
  const auto columns = [&]<int C>() {
    for (; d + C * kLanes <= head_dim; d += C * kLanes) {
      add_value_columns<T, N, C>(values, count, p, acc, acc_stride, d, coming);
    }
  };
  columns.template operator()<kWide>();
  if constexpr (kWide >= 8) columns.template operator()<4>();
  if constexpr (kWide >= 4) columns.template operator()<2>();
  columns.template operator()<1>();
  if (d == head_dim) return;
  Vec sums[N];
  for (int r = 0; r < N; ++r) sums[r] = load(acc + r * acc_stride + d);
  for (int64_t j = 0; j < count; ++j) {
    const Vec x = load_first(reinterpret_cast<const T*>(values[j]) + d, head_dim - d);
    for (int r = 0; r < N; ++r) sums[r] = fma(broadcast(p[j * N + r]), x, sums[r]);
  }
  for (int r = 0; r < N; ++r) store(acc + r * acc_stride + d, sums[r]);
}

#if defined(__AVX512BF16__)
// Lanes 2i and 2i + 1 of both halves of a pair side by side: bfloat16 d of one key and of the next, d rising.
inline __m512i pair_indices(int first) {
  __m512i lanes = _mm512_set1_epi32(first | (first + 32) << 16);
  return _mm512_add_epi32(
      lanes, _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                _mm512_set1_epi32(0x10001)));
}

// p [count][N] becomes bfloat16 pairs [count / 2][N][2] in the same memory.
template <int N>
inline void pair_up(float* p, int64_t count) {
  uint16_t order[16];
  for (int i = 0; i < 16; ++i) order[i] = static_cast<uint16_t>((i / (2 * N) * 2 + i % 2) * N + i / 2 % N);
  const __m256i indices = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(order));
  auto* pairs = reinterpret_cast<BFloat16*>(p);
  for (int64_t i = 0; i < count * N; i += 16) {
    const __m256i narrowed = narrow_operand(load(p + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + i), _mm256_permutexvar_epi16(indices, narrowed));
  }
}

// acc[r] += sum_j p[j][r] * values[j] in C steps of 32 columns from d on; two keys at a time, as bfloat16
// pairs.
template <int N, int C>
inline void add_pair_columns(const RowAddress* values, int64_t count, int64_t head_dim, const uint32_t* pairs,
                             float* acc, int64_t acc_stride, int64_t d, const RowAddress* coming) {
  const __m512i low = pair_indices(0), high = pair_indices(16);
  const int64_t left = head_dim - d;
  const auto mask = static_cast<__mmask32>(left >= 32 ? ~uint32_t{0} : (uint32_t{1} << left) - 1);
  const auto read = [&](RowAddress row, int c) {
    const BFloat16* value = reinterpret_cast<const BFloat16*>(row) + d + 32 * c;
    return C == 1 ? _mm512_maskz_loadu_epi16(mask, value) : _mm512_loadu_si512(value);
  };
  const bool both = left > 16;  // the padded row holds the upper half of the last step
  __m512 sums[N][C][2];
#pragma GCC unroll 4
  for (int r = 0; r < N; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const float* from = acc + r * acc_stride + d + 32 * c;
      sums[r][c][0] = _mm512_loadu_ps(from);
      sums[r][c][1] = both ? _mm512_loadu_ps(from + 16) : _mm512_setzero_ps();
    }
  }
  for (int64_t j = 0; j < count; j += 2) {
    __m512i x[C][2];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      if (coming) {
        prefetch(coming[j] + 2 * d + 64 * c);
        prefetch(coming[j + 1] + 2 * d + 64 * c);
      }
      const __m512i even = read(values[j], c), odd = read(values[j + 1], c);
      x[c][0] = _mm512_permutex2var_epi16(even, low, odd);
      x[c][1] = _mm512_permutex2var_epi16(even, high, odd);
    }
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) {
      const __m512i weight = _mm512_set1_epi32(static_cast<int>(pairs[j / 2 * N + r]));
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        sums[r][c][0] = _mm512_dpbf16_ps(sums[r][c][0], (__m512bh)weight, (__m512bh)x[c][0]);
        sums[r][c][1] = _mm512_dpbf16_ps(sums[r][c][1], (__m512bh)weight, (__m512bh)x[c][1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < N; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* to = acc + r * acc_stride + d + 32 * c;
      _mm512_storeu_ps(to, sums[r][c][0]);
      if (both) _mm512_storeu_ps(to + 16, sums[r][c][1]);
    }
  }
}

// The value past an odd `count` is a row of zeros: see KeyBlock.
template <int N>
inline void add_values_in_pairs(const RowAddress* values, int64_t count, int64_t head_dim, float* p,
                                float* acc, int64_t acc_stride, const RowAddress* coming) {
  constexpr int kWide = N == 4 ? 2 : 4;
  pair_up<N>(p, round_up(count, kLanes));
  const auto* pairs = reinterpret_cast<const uint32_t*>(p);
  int64_t d = 0;
  for (; d + 32 * kWide <= head_dim; d += 32 * kWide) {
    add_pair_columns<N, kWide>(values, count, head_dim, pairs, acc, acc_stride, d, coming);
  }
  for (; d < head_dim; d += 32)
    add_pair_columns<N, 1>(values, count, head_dim, pairs, acc, acc_stride, d, coming);
}
#endif

// The values of a block by the faster of the two. p is used up.
template <class T, bool kFloats, int N>
inline void add_block_values(const RowAddress* values, int64_t count, int64_t head_dim, float* p, float* acc,
                             int64_t acc_stride, const RowAddress* coming) {
#if defined(__AVX512BF16__)
  if constexpr (Dot<T, kFloats>::kPairs)
    return add_values_in_pairs<N>(values, count, head_dim, p, acc, acc_stride, coming);
#endif
  add_values<T, N>(values, count, head_dim, p, acc, acc_stride, coming);
}

// The running softmax of a tile, in base 2. Lane i belongs to row i % N. `l` is partial, a part of it in each
// lane.
struct RunningSoftmax {
  float m[kLanes];
  float l[kLanes];

  void reset() {
    store(m, broadcast(-kInfinity));
    store(l, broadcast(0.f));
  }
};

// The maximum of the lanes of each row, in all of them.
template <int N>
inline Vec max_of_rows(Vec x) {
  if constexpr (N == 1) return broadcast(reduce_max(x));
  float lanes[kLanes];
  store(lanes, x);
  for (int i = N; i < kLanes; ++i) lanes[i % N] = lanes[i] > lanes[i % N] ? lanes[i] : lanes[i % N];
  for (int i = N; i < kLanes; ++i) lanes[i] = lanes[i % N];
  return load(lanes);
}

// m, or 0 where there is none yet: exp2(-inf - 0) = 0, where -inf - -inf would be NaN.
inline Vec finite_pivot(Vec m) { return select_ge(m, broadcast(-kMaxFloat), m, broadcast(0.f)); }

// Scores [count][N] become p, relative to the new m; acc of the tile follows it.
template <int N>
inline void absorb(float* scores, int64_t count, RunningSoftmax& state, float* acc, int64_t acc_stride,
                   int64_t padded) {
  const Vec m_old = load(state.m);
  Vec m = m_old;
  for (int64_t i = 0; i < count * N; i += kLanes) m = max(m, load(scores + i));
  m = max_of_rows<N>(m);
  const Vec pivot = finite_pivot(m);
  Vec l = load(state.l);
  store(state.m, m);
  float previous[kLanes];
  store(previous, m_old);
  bool raised = false;
  for (int r = 0; r < N; ++r) raised |= state.m[r] != previous[r];
  if (raised) {
    const Vec alpha = exp2_clamped(m_old - pivot);
    l = l * alpha;
    float alphas[kLanes];
    store(alphas, alpha);
    for (int r = 0; r < N; ++r) {
      for (int64_t d = 0; d < padded; d += kLanes) {
        store(acc + r * acc_stride + d, broadcast(alphas[r]) * load(acc + r * acc_stride + d));
      }
    }
  }
  for (int64_t i = 0; i < count * N; i += kLanes) {
    const Vec p = exp2_clamped(load(scores + i) - pivot);
    l = l + p;
    store(scores + i, p);
  }
  store(state.l, l);
}

// l of a row.
template <int N>
inline float sum_of_row(const RunningSoftmax& state, int r) {
  float l = 0;
  for (int i = r; i < kLanes; i += N) l += state.l[i];
  return l;
}

}  // namespace
}  // namespace zinit::cpu
