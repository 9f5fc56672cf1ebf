// The matrix product that all of forward and backward are made of, on packed units (tiles.h):
//   c[r][lane] (+)= sum_k a[r, k] * b[k][lane]
// a is read one unit at a time and broadcast, with any two strides, so that a [keys][queries] tile serves as
// it is and transposed; b and c have their lanes contiguous. No transposes, no horizontal sums.
#pragma once
#include "tiles.h"

namespace zinit::cpu {
namespace {

// Rows of c held in registers, two vectors wide: 16 of AVX-512's 32 registers already hide the latency.
// Products over ranges have a range for each kRows rows, which must not straddle two vectors of queries:
// kRows divides kLanes.
constexpr int kRows = kLanes == 16 ? 8 : 4;
constexpr int kMaxRows = kLanes == 8 ? 6 : kRows;

template <class Tile>
struct Product {
  const typename Tile::Unit* a;
  int64_t a_row, a_step;
  const typename Tile::Unit* b;
  int64_t b_step;
};

struct Range {
  int64_t begin, end;
};

// Where a product goes, one vector at a time: c = ab, c += ab, or c = row_scale * c + ab.
struct Overwrite {
  float* c;
  int64_t c_row;
  void operator()(int64_t row, int64_t lane, Vec sum) const { store(c + row * c_row + lane, sum); }
};

// c is added last. Adding each term to it would round the term to the size of c, an error of up to 3 times
// eager's with 128 prompts.
struct Add {
  float* c;
  int64_t c_row;
  void operator()(int64_t row, int64_t lane, Vec sum) const {
    float* to = c + row * c_row + lane;
    store(to, load(to) + sum);
  }
};

struct ScaleAndAdd {
  float* c;
  int64_t c_row;
  const float* row_scale;
  void operator()(int64_t row, int64_t lane, Vec sum) const {
    float* to = c + row * c_row + lane;
    store(to, fma(load(to), broadcast(row_scale[row]), sum));
  }
};

// An `Into` that has `also` takes a second sum, over that range, and tells what it noted about the results.
// Going on with the first sum instead would round it to the size of both: up to 1.8 times the error with 128
// prompts.
template <class Tile, class Into, int ROWS, int VECS>
[[gnu::always_inline]] inline void micro_kernel(const Product<Tile>& product, const Into& into, int64_t row,
                                                int64_t lane, Range range) {
  Vec sum[ROWS][VECS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) sum[r][v] = broadcast(0.f);
  }
  const auto reduce = [&](Range over) __attribute__((always_inline)) {
    const typename Tile::Unit* a = product.a + row * product.a_row + over.begin * product.a_step;
    const typename Tile::Unit* b = product.b + lane + over.begin * product.b_step;
    for (int64_t k = over.begin; k < over.end; ++k, a += product.a_step, b += product.b_step) {
      typename Tile::UnitVec column[VECS];
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) column[v] = Tile::load_units(b + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) {
          sum[r][v] = Tile::multiply_add(a[r * product.a_row], column[v], sum[r][v]);
        }
      }
    }
  };
  reduce(range);
  if constexpr (requires { into.also; }) {
    Vec first[ROWS][VECS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) first[r][v] = sum[r][v], sum[r][v] = broadcast(0.f);
    }
    reduce(into.also);
    typename Into::Seen seen;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) into(row + r, lane + v * kLanes, first[r][v], sum[r][v], r == 0, seen);
    }
    into.seen->note(seen);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) into(row + r, lane + v * kLanes, sum[r][v]);
    }
  }
}

template <class Tile, class Into, int ROWS, int VECS>
[[gnu::noinline]] void full_kernel(const Product<Tile>& product, const Into& into, int64_t row, int64_t lane,
                                   Range range) {
  micro_kernel<Tile, Into, ROWS, VECS>(product, into, row, lane, range);
}

// `rows` <= ROWS of them.
template <class Tile, int VECS, int ROWS, class Into>
inline void group_kernel(const Product<Tile>& product, const Into& into, int64_t row, int64_t rows,
                         int64_t lane, Range range) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return group_kernel<Tile, VECS, ROWS - 1>(product, into, row, rows, lane, range);
  }
  full_kernel<Tile, Into, ROWS, VECS>(product, into, row, lane, range);
}

// Rows row_begin .. row_end, one or two vectors of lanes from `lane` on, the whole reduction.
template <class Tile, int VECS, class Into>
inline void product_rows(const Product<Tile>& product, const Into& into, int64_t row_begin, int64_t row_end,
                         int64_t lane, int64_t steps) {
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t left = row_end - row;
    // The last two groups share their rows evenly: 8 + 2 would leave the second waiting for its own sums.
    const int64_t rows = left >= 2 * kMaxRows || left == kMaxRows ? kMaxRows
                         : left < kMaxRows                        ? left
                                                                  : (left + 1) / 2;
    group_kernel<Tile, VECS, kMaxRows>(product, into, row, rows, lane, {0, steps});
    row += rows;
  }
}

// All rows, and `lanes` lanes (a multiple of kLanes). Rows g * kRows .. are reduced over ranges[g] alone.
template <class Tile, class Into>
inline void product_ranges(const Product<Tile>& product, const Into& into, int64_t rows, int64_t lanes,
                           const Range* ranges) {
  int64_t lane = 0;
  for (; lane + kStrip <= lanes; lane += kStrip) {
    for (int64_t row = 0, g = 0; row < rows; row += kRows, ++g) {
      group_kernel<Tile, 2, kRows>(product, into, row, min(kRows, rows - row), lane, ranges[g]);
    }
  }
  if (lane < lanes) {
    for (int64_t row = 0, g = 0; row < rows; row += kRows, ++g) {
      group_kernel<Tile, 1, kRows>(product, into, row, min(kRows, rows - row), lane, ranges[g]);
    }
  }
}

// One row of it.
template <class Tile, class Into>
inline void product_of_row(const Product<Tile>& product, const Into& into, int64_t row, int64_t lanes,
                           const Range* ranges) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    full_kernel<Tile, Into, 1, 1>(product, into, row, lane, ranges[row / kRows]);
  }
}

}  // namespace
}  // namespace zinit::cpu
