// A block's tiles of queries and keys in shared memory, and the products of a warp with them.
//
// A warp owns kRowTiles times 16 query rows. Of an mma's result, lane l holds rows l / 4 and l / 4 + 8 (its
// `half` 0 and 1) and columns l % 4 * 2, +1.
#pragma once
#include "../block.h"
#include "../elements.cuh"

namespace zinit::cuda {

template <int HEAD_DIM, int ROW_TILES, int KEYS>
struct TileShape {
  static constexpr int kHeadDim = HEAD_DIM, kRowTiles = ROW_TILES, kKeys = KEYS;
  static constexpr int kWarpRows = kRowTiles * 16, kQueries = kWarps * kWarpRows;
  // Elements from row to row: an odd number of 16-byte vectors, so that the 8 rows of a matrix meet every
  // bank once, and all addresses are a base and a constant, as they would not be with swizzled rows.
  static constexpr int kStride = kHeadDim + 8;
  static constexpr int kQueryElements = kQueries * kStride, kKeyElements = kKeys * kStride;

  using Output = float[kRowTiles][kHeadDim / 8][4];
  using Rows = float[kRowTiles][2];  // one number for each row of a lane
};

// The rows of a sequence in a packed tensor, inside it whatever the lengths say.
struct PackedRows {
  int first, count;

  __device__ PackedRows(const int32_t* cumulative, int sequence, int64_t total) {
    const auto rows = static_cast<int>(total);
    first = min(max(cumulative[sequence], 0), rows);
    count = min(max(cumulative[sequence + 1], first), rows) - first;
  }
};

__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / 32; }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }

// The tile's row that a lane's result belongs to.
template <class Shape>
__device__ __forceinline__ int row_of_result(int t, int half) {
  return warp_index() * Shape::kWarpRows + t * 16 + half * 8 + lane_index() / 4;
}

// f(row, first element) for each 16-byte vector of rows [0, rows) that this thread copies. Not unrolled: with
// the addresses of several copies at once, prefill spills at D = 128 on sm_90.
template <class Shape, class F>
__device__ __forceinline__ void each_vector(int rows, const F& f) {
  constexpr int kVectors = Shape::kHeadDim / 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * kVectors; i += kThreads) {
    f(i / kVectors, i % kVectors * 8);
  }
}

// f(t, n, i) for each number that a lane holds of a tile of COLUMNS * 8 columns.
template <class Shape, int COLUMNS, class F>
__device__ __forceinline__ void each_result(const F& f) {
#pragma unroll
  for (int t = 0; t < Shape::kRowTiles; ++t) {
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f(t, n, i);
    }
  }
}

// scores = queries of the warp times the first COLUMNS * 8 keys.
template <class T, class Shape, int COLUMNS>
__device__ __forceinline__ void multiply_keys(float (&scores)[Shape::kRowTiles][COLUMNS][4], const T* queries,
                                              const T* keys) {
  const int lane = lane_index();
  const T* query = queries + (warp_index() * Shape::kWarpRows + lane % 16) * Shape::kStride + lane / 16 * 8;
  const T* key = keys + (lane / 16 * 8 + lane % 8) * Shape::kStride + lane / 8 % 2 * 8;
  each_result<Shape, COLUMNS>([&](int t, int n, int i) { scores[t][n][i] = 0.f; });
#pragma unroll
  for (int d = 0; d < Shape::kHeadDim; d += 16) {
    uint32_t a[Shape::kRowTiles][4];
#pragma unroll
    for (int t = 0; t < Shape::kRowTiles; ++t) load_matrices(a[t], query + t * 16 * Shape::kStride + d);
#pragma unroll
    for (int n = 0; n < COLUMNS; n += 2) {
      uint32_t b[4];
      load_matrices(b, key + n * 8 * Shape::kStride + d);
#pragma unroll
      for (int t = 0; t < Shape::kRowTiles; ++t) {
        mma_m16n8k16<T>(scores[t][n], a[t], b[0], b[1]);
        mma_m16n8k16<T>(scores[t][n + 1], a[t], b[2], b[3]);
      }
    }
  }
}

// out += weights times the first COLUMNS * 8 values.
template <class T, class Shape, int COLUMNS>
__device__ __forceinline__ void add_values(typename Shape::Output& out,
                                           const float (&weights)[Shape::kRowTiles][COLUMNS][4],
                                           const T* values) {
  const int lane = lane_index();
  const T* value = values + (lane / 8 % 2 * 8 + lane % 8) * Shape::kStride + lane / 16 * 8;
#pragma unroll
  for (int n = 0; n < COLUMNS; n += 2) {
    uint32_t a[Shape::kRowTiles][4];  // a result's layout is that of the next product's left side
#pragma unroll
    for (int t = 0; t < Shape::kRowTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &weights[t][n + i / 2][i % 2 * 2];
        a[t][i] = pack<T>(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int d = 0; d < Shape::kHeadDim; d += 16) {
      uint32_t b[4];
      load_matrices_transposed(b, value + n * 8 * Shape::kStride + d);
#pragma unroll
      for (int t = 0; t < Shape::kRowTiles; ++t) {
        mma_m16n8k16<T>(out[t][d / 8], a[t], b[0], b[1]);
        mma_m16n8k16<T>(out[t][d / 8 + 1], a[t], b[2], b[3]);
      }
    }
  }
}

template <class Shape>
__device__ __forceinline__ void multiply_rows(typename Shape::Output& out,
                                              const typename Shape::Rows& factors) {
  each_result<Shape, Shape::kHeadDim / 8>([&](int t, int n, int i) { out[t][n][i] *= factors[t][i / 2]; });
}

// The warp's rows, rounded, into a tile that holds as many rows as queries, added to what is there if ADDS;
// then from there to `row(i)` for i below `rows`, 16 bytes at a time.
template <bool ADDS, class T, class Shape, class RowPointer>
__device__ __forceinline__ void write_rows(const typename Shape::Output& out, T* tile, int rows,
                                           const RowPointer& row) {
  __syncwarp();  // other lanes have read what is overwritten
#pragma unroll
  for (int t = 0; t < Shape::kRowTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* at = tile + row_of_result<Shape>(t, half) * Shape::kStride + lane_index() % 4 * 2;
#pragma unroll
      for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
        float low = out[t][n][half * 2], high = out[t][n][half * 2 + 1];
        if constexpr (ADDS) low += to_float(at[n * 8]), high += to_float(at[n * 8 + 1]);
        *reinterpret_cast<uint32_t*>(at + n * 8) = pack<T>(low, high);
      }
    }
  }
  __syncwarp();
  constexpr int kVectors = Shape::kHeadDim / 8;
  for (int i = lane_index(); i < Shape::kWarpRows * kVectors; i += 32) {
    const int r = warp_index() * Shape::kWarpRows + i / kVectors, d = i % kVectors * 8;
    if (r < rows) {
      *reinterpret_cast<uint4*>(row(r) + d) = *reinterpret_cast<const uint4*>(tile + r * Shape::kStride + d);
    }
  }
}

}  // namespace zinit::cuda
