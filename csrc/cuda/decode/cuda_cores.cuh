// Decode attention on the CUDA cores, for 1 query row or 4: float32 with any group of heads, half precision
// with small ones.
#pragma once
#include "finish.cuh"
#include "stage.cuh"

namespace zinit::cuda {

__host__ __device__ constexpr int lanes_for(int vectors) {
  int lanes = 1;
  while (lanes < vectors && lanes < 32) lanes *= 2;
  return lanes;
}

// A key is read by as many neighbouring lanes as it has vectors of 16 bytes, rounded up to a power of two
// (what the extra lanes load is not used). Each lane has kUnroll keys and their values in flight.
template <class T, int D, int ROWS>
__global__ void __launch_bounds__(kThreads, ROWS == 1 ? 3 : 2) zinit_decode_cuda_cores(const DecodeWork w) {
  constexpr int kVector = kPerVector<T>, kLanes = lanes_for(D / kVector);
  constexpr int kChunks = (D / kVector + kLanes - 1) / kLanes;
  constexpr int kUnroll = 4 / kChunks, kLaneGroups = 32 / kLanes, kTile = kLaneGroups * kUnroll;
  DYNAMIC_SHARED(memory);
  const Shared<T> shared(memory, SharedLayout(ROWS, D, sizeof(T), static_cast<int>(w.prompt_length),
                                              static_cast<int>(w.seqlen_new)));
  const Share share = Share::of_block<ROWS>(w);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int lane_group = lane / kLanes, first_d = lane % kLanes * kVector;

  trigger_programmatic_launch_completion();
  stage_queries(w, share.sequence, share.kv_head, share.first_row, share.rows, ROWS, shared);
  stage_new_tokens(w, share, shared);
  __syncthreads();

  Visible visible[ROWS];
  float query[ROWS][kChunks][kVector], acc[ROWS][kChunks][kVector] = {}, m[ROWS], l[ROWS] = {};
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    visible[row] = share.visible(w, row);
    m[row] = -INFINITY;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = first_d + c * kLanes * kVector;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float element = d < D ? to_float(shared.queries[row * shared.query_stride + d + i]) : 0.f;
        query[row][c][i] = element * (w.scale * kLog2E);
      }
    }
  }

  KeyTile<T, kTile> tile(w, share, shared);
  tile.find(share.begin + warp * kTile);
  for (int first = share.begin + warp * kTile; first < share.end; first += kWarps * kTile) {
    uint4 keys[kUnroll][kChunks], values[kUnroll][kChunks];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int key = u * kLaneGroups + lane_group;
      const T *key_at = tile.key(key), *value_at = tile.value(key);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int d = first_d + c * kLanes * kVector, inside = d < D ? d : 0;  // the query is 0 from D on
        keys[u][c] = load_vector(key_at + inside);
        values[u][c] = load_vector(value_at + inside);
      }
    }
    tile.find(first + kWarps * kTile);
    if (first + kTile > share.end) {  // slots past the end: the weight 0 times inf would be NaN
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kLaneGroups + lane_group < share.end) continue;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) values[u][c] = make_uint4(0, 0, 0, 0);
      }
    }

    float p[ROWS][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int row = 0; row < ROWS; ++row) p[row][u] = 0.f;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        float key[kVector];
        unpack<T>(keys[u][c], key);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) p[row][u] += query[row][c][i] * key[i];
        }
      }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int distance = kLanes / 2; distance; distance /= 2) {
          p[row][u] += __shfl_xor_sync(kAllLanes, p[row][u], distance);
        }
      }
    }
    if (w.softcap > 0.f) {
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) p[row][u] = capped(p[row][u], 1.f, w.softcap);
      }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      float m_new = m[row];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int key = first + u * kLaneGroups + lane_group;
        if (!visible[row].holds(key)) p[row][u] = -INFINITY;
        m_new = fmaxf(m_new, p[row][u]);
      }
      const float pivot = m_new == -INFINITY ? 0.f : m_new;
      const float alpha = fast_exp2(m[row] - pivot);
      m[row] = m_new;
      l[row] *= alpha;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        p[row][u] = fast_exp2(p[row][u] - pivot);
        l[row] += p[row][u];
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) acc[row][c][i] *= alpha;
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        float value[kVector];
        unpack<T>(values[u][c], value);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) acc[row][c][i] += p[row][u] * value[i];
        }
      }
    }
  }

#pragma unroll
  for (int row = 0; row < ROWS; ++row) {  // the lane groups of the warp become one
#pragma unroll
    for (int distance = kLanes; distance < 32; distance *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, m[row], distance);
      const float both = fmaxf(m[row], other), pivot = both == -INFINITY ? 0.f : both;
      const float mine = fast_exp2(m[row] - pivot);
      m[row] = both;
      l[row] *= mine;
      l[row] += __shfl_xor_sync(kAllLanes, l[row], distance);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          acc[row][c][i] *= mine;
          acc[row][c][i] += __shfl_xor_sync(kAllLanes, acc[row][c][i], distance);
        }
      }
    }
    if (lane == 0) {
      shared.states[(warp * ROWS + row) * 2] = m[row];
      shared.states[(warp * ROWS + row) * 2 + 1] = l[row];
    }
  }
  merge_and_finish<T, ROWS>(w, share, shared, [&](auto&& factor_of, auto&& add) {
    if (lane_group > 0) return;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      if (row >= share.rows) continue;
      const float factor = factor_of(row);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int d = first_d + c * kLanes * kVector;
        if (d >= D) continue;
        const float (&part)[kVector] = acc[row][c];
#pragma unroll
        for (int i = 0; i < kVector; i += 4) {
          add(row, d + i, factor, make_float4(part[i], part[i + 1], part[i + 2], part[i + 3]));
        }
      }
    }
  });
}

}  // namespace zinit::cuda
