// Decode attention on the CUDA cores, for 1 query row or 4: float32 caches of any group, half precision of
// small ones.
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
// (what the rest load is not used); each lane has kUnroll keys and their values in flight.
template <class T, int D, int ROWS>
__global__ void __launch_bounds__(kThreads, ROWS == 1 ? 3 : 2) decode_on_cuda_cores(const DecodeWork w) {
  constexpr int kVector = kPerVector<T>, kLanes = lanes_for(D / kVector);
  constexpr int kChunks = (D / kVector + kLanes - 1) / kLanes;
  constexpr int kUnroll = 4 / kChunks, kLaneGroups = 32 / kLanes, kTile = kLaneGroups * kUnroll;
  DYNAMIC_SHARED(memory);
  const Shared<T> shared(memory, SharedLayout(ROWS, D, sizeof(T), static_cast<int>(w.prompt_length),
                                              static_cast<int>(w.seqlen_new)));
  const Share share = Share::of_block<ROWS>(w);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int lane_group = lane / kLanes, first_d = lane % kLanes * kVector;

  let_launch_behind_begin();
  stage_queries(w, share.sequence, share.kv_head, share.first_row, share.rows, ROWS, shared);
  stage_new_tokens(w, share, shared);
  __syncthreads();

  Visible visible[ROWS];
  float query[ROWS][kChunks][kVector], out[ROWS][kChunks][kVector] = {}, largest[ROWS], sum[ROWS] = {};
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    visible[row] = share.visible(w, row);
    largest[row] = -INFINITY;
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
        const int d = first_d + c * kLanes * kVector, inside = d < D ? d : 0;  // the query is zero behind D
        keys[u][c] = load_vector(key_at + inside);
        values[u][c] = load_vector(value_at + inside);
      }
    }
    tile.find(first + kWarps * kTile);

    float weights[ROWS][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int row = 0; row < ROWS; ++row) weights[row][u] = 0.f;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        float key[kVector];
        unpack<T>(keys[u][c], key);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) weights[row][u] += query[row][c][i] * key[i];
        }
      }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      float new_largest = largest[row];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int distance = kLanes / 2; distance; distance /= 2) {
          weights[row][u] += __shfl_xor_sync(kAllLanes, weights[row][u], distance);
        }
        const int key = first + u * kLaneGroups + lane_group;
        if (!visible[row].holds(key)) weights[row][u] = -INFINITY;
        new_largest = fmaxf(new_largest, weights[row][u]);
      }
      const float pivot = new_largest == -INFINITY ? 0.f : new_largest;
      const float correction = fast_exp2(largest[row] - pivot);
      largest[row] = new_largest;
      sum[row] *= correction;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        weights[row][u] = fast_exp2(weights[row][u] - pivot);
        sum[row] += weights[row][u];
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) out[row][c][i] *= correction;
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
          for (int i = 0; i < kVector; ++i) out[row][c][i] += weights[row][u] * value[i];
        }
      }
    }
  }

#pragma unroll
  for (int row = 0; row < ROWS; ++row) {  // the warp's lane groups become one
#pragma unroll
    for (int distance = kLanes; distance < 32; distance *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, largest[row], distance);
      const float both = fmaxf(largest[row], other), pivot = both == -INFINITY ? 0.f : both;
      const float mine = fast_exp2(largest[row] - pivot);
      largest[row] = both;
      sum[row] *= mine;
      sum[row] += __shfl_xor_sync(kAllLanes, sum[row], distance);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          out[row][c][i] *= mine;
          out[row][c][i] += __shfl_xor_sync(kAllLanes, out[row][c][i], distance);
        }
      }
    }
    if (lane == 0) {
      shared.states[(warp * ROWS + row) * 2] = largest[row];
      shared.states[(warp * ROWS + row) * 2 + 1] = sum[row];
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
        const float (&part)[kVector] = out[row][c];
#pragma unroll
        for (int i = 0; i < kVector; i += 4) {
          add(row, d + i, factor, make_float4(part[i], part[i + 1], part[i + 2], part[i + 3]));
        }
      }
    }
  });
}

}  // namespace zinit::cuda
