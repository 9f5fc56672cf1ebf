// Decode attention on the tensor cores: 16 query rows share one reading of each key, straight from global
// memory into the fragments of mma.m16n8k16.
//
// An mma sums over its k and does not care in which order, and its columns may stand for any dimensions. So
// the lane that must hold parts of a key takes 8 neighbouring dimensions of it, one 16-byte load for two mma,
// and the queries are read in the same order; a value's 8 neighbouring dimensions go to 8 different mma, the
// same column of each.
#pragma once
#include "finish.cuh"
#include "stage.cuh"

namespace zinit::cuda {

__device__ __forceinline__ uint32_t word_of(const uint4& vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2) decode_on_tensor_cores(const DecodeWork w) {
  constexpr int kRows = kTensorCoreRows, kTile = 16;
  constexpr int kKeyChunks = (D + 31) / 32,
                kValueChunks = (D + 63) / 64;  // dimensions that 4 and 8 lanes load
  constexpr bool kAllEarly = D <= 128;         // all of a tile in flight at once; more would spill registers
  DYNAMIC_SHARED(memory);
  const Shared<T> shared(memory, SharedLayout(kRows, D, sizeof(T), static_cast<int>(w.prompt_length),
                                              static_cast<int>(w.seqlen_new)));
  const Share share = Share::of_block<kRows>(w);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = lane / 4, quarter = lane % 4;  // of an mma's fragments: row or column, and place in it

  let_launch_behind_begin();
  stage_queries(w, share.sequence, share.kv_head, share.first_row, share.rows, kRows, shared);
  stage_new_tokens(w, share, shared);
  __syncthreads();

  const float scale = w.scale * kLog2E;
  const Visible visible[2] = {share.visible(w, group), share.visible(w, group + 8)};
  float out[kValueChunks][8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  KeyTile<T, kTile> tile(w, share, shared);
  tile.find(share.begin + warp * kTile);
  for (int first = share.begin + warp * kTile; first < share.end; first += kWarps * kTile) {
    uint4 keys[2][kKeyChunks];
    const auto load_keys = [&](int n) {
      const T* key = tile.key(n * 8 + group);
#pragma unroll
      for (int c = 0; c < kKeyChunks; ++c) {
        const int d = c * 32 + quarter * 8;
        keys[n][c] = load_vector(key + (d < D ? d : 0));  // the query is zero behind D
      }
    };
    const T* value_rows[4];  // of the keys whose weights this lane will hold
#pragma unroll
    for (int i = 0; i < 4; ++i) value_rows[i] = tile.value(quarter * 2 + i % 2 + i / 2 * 8);
    uint4 values[kValueChunks][4];
    const auto load_values = [&](int c) {
      const int d = c * 64 + group * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) values[c][i] = load_vector(value_rows[i] + (d < D ? d : 0));
    };
    if constexpr (kAllEarly) {
      load_keys(0);
      load_keys(1);
#pragma unroll
      for (int c = 0; c < kValueChunks; ++c) load_values(c);
      tile.find(first + kWarps * kTile);
    }

    float scores[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if constexpr (!kAllEarly) load_keys(n);
#pragma unroll
      for (int c = 0; c < kKeyChunks; ++c) {
        const T* query = shared.queries + group * shared.query_stride + c * 32 + quarter * 8;
        const uint4 low = *reinterpret_cast<const uint4*>(query);
        const uint4 high = *reinterpret_cast<const uint4*>(query + 8 * shared.query_stride);
        mma_m16n8k16<T>(scores[n], {low.x, high.x, low.y, high.y}, keys[n][c].x, keys[n][c].y);
        mma_m16n8k16<T>(scores[n], {low.z, high.z, low.w, high.w}, keys[n][c].z, keys[n][c].w);
      }
    }

    float new_largest[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + n * 8 + quarter * 2 + i % 2;
        const float score = __fmul_rn(scores[n][i], scale);  // see kFusedBelow in softmax.cuh
        scores[n][i] = visible[i / 2].holds(key) ? score : -INFINITY;
        new_largest[i / 2] = fmaxf(new_largest[i / 2], scores[n][i]);
      }
    }
    float pivot[2], correction[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      new_largest[half] = fmaxf(new_largest[half], __shfl_xor_sync(kAllLanes, new_largest[half], 1));
      new_largest[half] = fmaxf(new_largest[half], __shfl_xor_sync(kAllLanes, new_largest[half], 2));
      pivot[half] = new_largest[half] == -INFINITY ? 0.f : new_largest[half];
      correction[half] = fast_exp2(largest[half] - pivot[half]);
      largest[half] = new_largest[half];
      sum[half] *= correction[half];
    }
    uint32_t weights[4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = fast_exp2(scores[n][i] - pivot[i / 2]);
        sum[i / 2] += scores[n][i];
      }
      weights[2 * n] = pack<T>(scores[n][0], scores[n][1]);
      weights[2 * n + 1] = pack<T>(scores[n][2], scores[n][3]);
    }
#pragma unroll
    for (int c = 0; c < kValueChunks; ++c) {
      if constexpr (!kAllEarly) {
        __syncwarp();  // keeps the compiler from taking all loads to the top, and then spilling
        load_values(c);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[c][j][i] *= correction[i / 2];
        const unsigned selector = j % 2 ? 0x7632 : 0x5410;  // the high or the low halves of two words
        const uint32_t near =
            __byte_perm(word_of(values[c][0], j / 2), word_of(values[c][1], j / 2), selector);
        const uint32_t far =
            __byte_perm(word_of(values[c][2], j / 2), word_of(values[c][3], j / 2), selector);
        mma_m16n8k16<T>(out[c][j], weights, near, far);
      }
    }
    if constexpr (!kAllEarly) tile.find(first + kWarps * kTile);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 1);
    sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 2);
    if (quarter == 0) {
      const int row = warp * kRows + group + half * 8;
      shared.states[2 * row] = largest[half];
      shared.states[2 * row + 1] = sum[half];
    }
  }
  merge_and_finish<T, kRows>(w, share, shared, [&](auto&& factor_of, auto&& add) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group + half * 8;
      if (row >= share.rows) continue;
      const float factor = factor_of(row);
#pragma unroll
      for (int c = 0; c < kValueChunks; ++c) {
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; ++i) {
          const int d = c * 64 + (quarter * 2 + i % 2) * 8;
          if (d >= D) continue;
#pragma unroll
          for (int j = 0; j < 8; j += 4) {
            add(row, d + j, factor,
                make_float4(out[c][j][i], out[c][j + 1][i], out[c][j + 2][i], out[c][j + 3][i]));
          }
        }
      }
    }
  });
}

}  // namespace zinit::cuda
