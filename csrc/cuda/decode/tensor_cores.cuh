// Decode attention on the tensor cores: 16 query rows share one reading of each key, straight from global
// memory into the fragments of mma.m16n8k16.
//
// An mma sums over its k in any order, and its columns may stand for any dimensions. So the lane that must
// hold parts of a key takes 8 neighbouring dimensions of it, one 16-byte load for two mma, and the queries
// are read in the same order. A value's 8 neighbouring dimensions go to 8 different mma, to the same column
// of each.
#pragma once
#include "finish.cuh"
#include "stage.cuh"

namespace zinit::cuda {

__device__ __forceinline__ uint32_t word_of(const uint4& vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2) zinit_decode_tensor_cores(const DecodeWork w) {
  constexpr int kRows = kTensorCoreRows, kTile = 16;
  constexpr int kKeyChunks = (D + 31) / 32, kValueChunks = (D + 63) / 64;  // what 4 and 8 lanes load
  constexpr bool kAllEarly = D <= 128;  // all loads of a tile in flight at once; more would spill registers
  DYNAMIC_SHARED(memory);
  const Shared<T> shared(memory, SharedLayout(kRows, D, sizeof(T), static_cast<int>(w.prompt_length),
                                              static_cast<int>(w.seqlen_new)));
  const Share share = Share::of_block<kRows>(w);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = lane / 4,
            quarter = lane % 4;  // in an mma's fragments: the row or column, and the place in it

  trigger_programmatic_launch_completion();
  stage_queries(w, share.sequence, share.kv_head, share.first_row, share.rows, kRows, shared);
  stage_new_tokens(w, share, shared);
  __syncthreads();

  const float scale = w.softcap > 0.f ? 1.f : w.scale * kLog2E;  // of a tile's scores, capped or not
  const Visible visible[2] = {share.visible(w, group), share.visible(w, group + 8)};
  float acc[kValueChunks][8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};

  KeyTile<T, kTile> tile(w, share, shared);
  tile.find(share.begin + warp * kTile);
  for (int first = share.begin + warp * kTile; first < share.end; first += kWarps * kTile) {
    uint4 keys[2][kKeyChunks];
    const auto load_keys = [&](int n) {
      const T* key = tile.key(n * 8 + group);
#pragma unroll
      for (int c = 0; c < kKeyChunks; ++c) {
        const int d = c * 32 + quarter * 8;
        keys[n][c] = load_vector(key + (d < D ? d : 0));  // the query is 0 from D on
      }
    };
    const T* value_rows[4];  // of the keys whose p this lane holds
#pragma unroll
    for (int i = 0; i < 4; ++i) value_rows[i] = tile.value(quarter * 2 + i % 2 + i / 2 * 8);
    uint4 values[kValueChunks][4];
    const auto load_values = [&](int c) {
      const int d = c * 64 + group * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) values[c][i] = load_vector(value_rows[i] + (d < D ? d : 0));
    };
    // Slots past the end: the weight 0 times inf would be NaN.
    const auto clear_values = [&](int c) {
      if (first + kTile <= share.end) return;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + quarter * 2 + i % 2 + i / 2 * 8 >= share.end) values[c][i] = make_uint4(0, 0, 0, 0);
      }
    };
    if constexpr (kAllEarly) {
      load_keys(0);
      load_keys(1);
#pragma unroll
      for (int c = 0; c < kValueChunks; ++c) load_values(c);
      tile.find(first + kWarps * kTile);
#pragma unroll
      for (int c = 0; c < kValueChunks; ++c) clear_values(c);
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

    if (w.softcap > 0.f) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] = capped(scores[n][i], w.scale * kLog2E, w.softcap);
      }
    }
    float m_new[2] = {m[0], m[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + n * 8 + quarter * 2 + i % 2;
        const float score = __fmul_rn(scores[n][i], scale);  // see kFusedBelow in softmax.cuh
        scores[n][i] = visible[i / 2].holds(key) ? score : -INFINITY;
        m_new[i / 2] = fmaxf(m_new[i / 2], scores[n][i]);
      }
    }
    float pivot[2], alpha[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m_new[half] = fmaxf(m_new[half], __shfl_xor_sync(kAllLanes, m_new[half], 1));
      m_new[half] = fmaxf(m_new[half], __shfl_xor_sync(kAllLanes, m_new[half], 2));
      pivot[half] = m_new[half] == -INFINITY ? 0.f : m_new[half];
      alpha[half] = fast_exp2(m[half] - pivot[half]);
      m[half] = m_new[half];
      l[half] *= alpha[half];
    }
    uint32_t p[4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = fast_exp2(scores[n][i] - pivot[i / 2]);
        l[i / 2] += scores[n][i];
      }
      p[2 * n] = pack<T>(scores[n][0], scores[n][1]);
      p[2 * n + 1] = pack<T>(scores[n][2], scores[n][3]);
    }
#pragma unroll
    for (int c = 0; c < kValueChunks; ++c) {
      if constexpr (!kAllEarly) {
        __syncwarp();  // keeps the compiler from moving all loads to the top, and then spilling
        load_values(c);
        clear_values(c);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[c][j][i] *= alpha[i / 2];
        const unsigned selector = j % 2 ? 0x7632 : 0x5410;  // the high or the low halves of two words
        const uint32_t near =
            __byte_perm(word_of(values[c][0], j / 2), word_of(values[c][1], j / 2), selector);
        const uint32_t far =
            __byte_perm(word_of(values[c][2], j / 2), word_of(values[c][3], j / 2), selector);
        mma_m16n8k16<T>(acc[c][j], p, near, far);
      }
    }
    if constexpr (!kAllEarly) tile.find(first + kWarps * kTile);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    l[half] += __shfl_xor_sync(kAllLanes, l[half], 1);
    l[half] += __shfl_xor_sync(kAllLanes, l[half], 2);
    if (quarter == 0) {
      const int row = warp * kRows + group + half * 8;
      shared.states[2 * row] = m[half];
      shared.states[2 * row + 1] = l[half];
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
                make_float4(acc[c][j][i], acc[c][j + 1][i], acc[c][j + 2][i], acc[c][j + 3][i]));
          }
        }
      }
    }
  });
}

}  // namespace zinit::cuda
