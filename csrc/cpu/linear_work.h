// The parameters of small-batch linear layers and of what decoding does around them. Plain C++.
//
// Letters: M rows of activations (tokens), N rows of a weight (output channels), K columns (input channels).
#pragma once
#include <cstdint>

#include "../params.h"

namespace zinit::cpu {

// How a weight [N, K] lies in memory. 0 is a plain tensor of rows. Otherwise the number is
// bits + 16 * has_min + 256 * group:
//
//   bits 8              w = scale * code, code in -128 .. 127, stored as code + 128
//   bits 4              w = scale * (code - 8), code in 0 .. 15
//   bits 4 with a min   w = scale * code + min, code in 0 .. 15
//
// Each `group` of neighbouring columns (32, 64 or 128) of a row has a float16 scale and perhaps a float16
// min. A packed weight is a sequence of panels, one for 16 rows. Rows past N have scale 0, and columns past K
// have codes that meet activations of 0. A panel holds
//
//   scales    [groups][16] float16, or [groups][2][16] with mins (scales first), padded to 64 bytes
//   codes     8 bits: [K / 4][16][4] bytes
//             4 bits: [K / 8][16][4] bytes: columns 0 .. 3 of the 8 in the low halves, 4 .. 7 in the high ones
//
// so that one instruction multiplies 4 columns of 16 rows, and the codes are read in order.
// Always inlined: isa_*.cpp must have no weak symbols (kernels.h).
struct Scheme {
  int64_t number = 0;
  [[gnu::always_inline]] bool packed() const { return number != 0; }
  [[gnu::always_inline]] int64_t bits() const { return number & 15; }
  [[gnu::always_inline]] bool has_min() const { return number >> 4 & 1; }
  [[gnu::always_inline]] int64_t group() const { return number >> 8; }
  [[gnu::always_inline]] bool valid() const {
    const int64_t g = group();
    const bool known = number == (bits() | (has_min() ? 16 : 0) | g << 8);
    return number == 0 ||
           (known && (g == 32 || g == 64 || g == 128) && (bits() == 4 || (bits() == 8 && !has_min())));
  }
  [[gnu::always_inline]] int64_t groups(int64_t columns) const { return (columns + group() - 1) / group(); }
  [[gnu::always_inline]] int64_t scale_bytes(int64_t columns) const {
    return (groups(columns) * (has_min() ? 64 : 32) + 63) / 64 * 64;
  }
  [[gnu::always_inline]] int64_t panel_bytes(int64_t columns) const {
    return scale_bytes(columns) + groups(columns) * group() * 16 * bits() / 8;
  }
};

constexpr int64_t kPanelRows = 16;
constexpr int64_t kMaxLinearRows = 64;  // M at most; the callers cut longer inputs

struct LinearWeight {
  const void* data = nullptr;
  int64_t rows = 0;               // N
  int64_t columns = 0;            // K
  DType dtype = DType::kFloat32;  // of a plain weight
  Scheme scheme;
};

// out[i] = norm(input) weight[i]^T for up to three weights, of M rows.
//   norm_weight   given: the rows are normed first, x / rms(x) * norm_weight, and rounded to their dtype
//   residual      given: added to out[0]
//   gated         out[0] = silu(input weight[0]^T) * (input weight[1]^T)
struct LinearWork {
  int64_t num_rows;         // M, 0 to kMaxLinearRows
  const void* input;        // [M, K], contiguous
  DType dtype;              // of input, norm_weight, residual and out
  const void* norm_weight;  // [K] or null
  float eps;
  int num_weights;
  LinearWeight weights[3];
  void* out[3];          // [M, N], contiguous
  const void* residual;  // [M, N of weight 0] or null; may be out[0]
  bool gated;
};

// The same of as many rows as there are, without a norm.
struct ManyWork : LinearWork {
  int64_t block;  // rows that meet 48 rows of a weight in one item
};

// out[m] = norm(input[m]), the same norm as above.
struct NormWork {
  int64_t num_rows, columns;
  const void* input;
  const void* norm_weight;
  float eps;
  DType dtype;
  void* out;
  float* rstd;  // [M], 1 / rms(input); or null
};

// Rows of a packed weight as numbers: out[i] = weight[indices[i]], or weight[first + i] without indices.
struct UnpackWork {
  LinearWeight weight;
  const int64_t* indices;  // or null
  int64_t num_rows;
  void* out;  // [num_rows, K]
  DType dtype;
};

}  // namespace zinit::cpu
