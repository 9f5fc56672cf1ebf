// The matrix product all of forward and backward are made of, on packed units (tiles.inl):
//   c[r][lane] (+)= sum_k a[r, k] * b[k][lane]
// a is read one unit at a time and broadcast, with any two strides, so that a [keys][queries] tile serves as
// it is and transposed; b and c have their lanes contiguous. No transposes, no horizontal sums.
#pragma once
#include "tiles.inl"

namespace zinit::cpu {
namespace {

// Rows of c held in registers, two vectors wide: 16 of AVX-512's 32 registers already hide the latency.
// Products over ranges have a range for each kRows rows, which must not straddle two vectors of queries:
// kRows divides kLanes.
constexpr int kRows = kLanes == 16 ? 8 : 4;
constexpr int kMaxRows = kLanes == 8 ? 6 : kRows;

enum class Into { kOverwrite, kAdd, kScaleAndAdd };  // c = ab, c += ab, c = row_scale * c + ab

template <class Tile>
struct Product {
  const typename Tile::Unit* a;
  int64_t a_row, a_step;
  const typename Tile::Unit* b;
  int64_t b_step;
  float* c;
  int64_t c_row;
  const float* row_scale = nullptr;  // [rows], for kScaleAndAdd
};

template <class Tile, Into INTO, int ROWS, int VECS>
[[gnu::always_inline]] inline void micro_kernel(const Product<Tile>& p, int64_t row, int64_t lane,
                                                int64_t begin, int64_t end) {
  const typename Tile::Unit* a = p.a + row * p.a_row + begin * p.a_step;
  const typename Tile::Unit* b = p.b + lane + begin * p.b_step;
  float* c = p.c + row * p.c_row + lane;
  Vec sum[ROWS][VECS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) sum[r][v] = broadcast(0.f);
  }
  for (int64_t k = begin; k < end; ++k, a += p.a_step, b += p.b_step) {
    typename Tile::UnitVec column[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) column[v] = Tile::load_units(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) sum[r][v] = Tile::multiply_add(a[r * p.a_row], column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      // c comes last: adding each term to what is there already would round it to the size of c, an error of
      // up to 3 times eager's with 128 prompts
      float* to = c + r * p.c_row + v * kLanes;
      if constexpr (INTO == Into::kOverwrite) store(to, sum[r][v]);
      if constexpr (INTO == Into::kAdd) store(to, load(to) + sum[r][v]);
      if constexpr (INTO == Into::kScaleAndAdd)
        store(to, fma(load(to), broadcast(p.row_scale[row + r]), sum[r][v]));
    }
  }
}

template <class Tile, Into INTO, int ROWS, int VECS>
[[gnu::noinline]] void full_kernel(const Product<Tile>& p, int64_t row, int64_t lane, int64_t begin,
                                   int64_t end) {
  micro_kernel<Tile, INTO, ROWS, VECS>(p, row, lane, begin, end);
}

// `rows` <= ROWS of them.
template <class Tile, Into INTO, int VECS, int ROWS>
inline void group_kernel(const Product<Tile>& p, int64_t row, int64_t rows, int64_t lane, int64_t begin,
                         int64_t end) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return group_kernel<Tile, INTO, VECS, ROWS - 1>(p, row, rows, lane, begin, end);
  }
  full_kernel<Tile, INTO, ROWS, VECS>(p, row, lane, begin, end);
}

// Rows row_begin .. row_end, one or two vectors of lanes from `lane` on, the whole reduction.
template <class Tile, Into INTO, int VECS>
inline void product_rows(const Product<Tile>& p, int64_t row_begin, int64_t row_end, int64_t lane,
                         int64_t steps) {
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t left = row_end - row;
    // The last two groups share their rows evenly: 8 + 2 would leave the second waiting for its own sums.
    const int64_t rows = left >= 2 * kMaxRows || left == kMaxRows ? kMaxRows
                         : left < kMaxRows                        ? left
                                                                  : (left + 1) / 2;
    group_kernel<Tile, INTO, VECS, kMaxRows>(p, row, rows, lane, 0, steps);
    row += rows;
  }
}

struct Range {
  int64_t begin, end;
};

// All rows and `lanes` lanes (a multiple of kLanes); rows g * kRows .. are reduced over ranges[g] only.
template <class Tile, Into INTO>
inline void product_ranges(const Product<Tile>& p, int64_t rows, int64_t lanes, const Range* ranges) {
  int64_t lane = 0;
  for (; lane + kStrip <= lanes; lane += kStrip) {
    for (int64_t row = 0, g = 0; row < rows; row += kRows, ++g) {
      group_kernel<Tile, INTO, 2, kRows>(p, row, min(kRows, rows - row), lane, ranges[g].begin,
                                         ranges[g].end);
    }
  }
  if (lane < lanes) {
    for (int64_t row = 0, g = 0; row < rows; row += kRows, ++g) {
      group_kernel<Tile, INTO, 1, kRows>(p, row, min(kRows, rows - row), lane, ranges[g].begin,
                                         ranges[g].end);
    }
  }
}

}  // namespace
}  // namespace zinit::cpu
