// What lies where in a decode block's shared memory: for the kernels, for their launcher, and for Python
// (_C_host).
#pragma once
#include "../block.h"

#if defined(__CUDACC__)
#define ZINIT_EVERYWHERE __host__ __device__
#else
#define ZINIT_EVERYWHERE
#endif

namespace zinit::cuda {

// The dynamic shared memory of a block, in bytes from its start.
struct SharedLayout {
  int query_stride;   // elements: 64 bytes past a multiple of 128: an mma's fragments meet no bank twice
  int queries;        // T [ROWS, query_stride], rotated, zeros from D on
  int merged_stride;  // floats: 8 past D: of eight lanes with four floats each, at most two meet a bank
  int merged;         // float [ROWS, merged_stride]
  int states;         // float [kWarps + 1, ROWS, 2]: m and l, of each warp and merged
  int scores;         // float [ROWS, P]
  int new_keys;       // T [T_new, D], rotated
  int new_values;     // T [T_new, D]
  int bytes;

  ZINIT_EVERYWHERE SharedLayout(int rows, int head_dim, int element_bytes, int prompt_length,
                                int new_tokens) {
    const int row_bytes = (head_dim * element_bytes + 127) / 128 * 128 + 64;
    query_stride = row_bytes / element_bytes;
    queries = 0;
    merged = queries + rows * row_bytes;
    merged_stride = head_dim + 8;
    states = merged + rows * merged_stride * 4;
    scores = states + (kWarps + 1) * rows * 8;
    new_keys = (scores + rows * prompt_length * 4 + 15) / 16 * 16;
    new_values = new_keys + new_tokens * head_dim * element_bytes;
    bytes = new_values + new_tokens * head_dim * element_bytes;
  }
};

}  // namespace zinit::cuda
