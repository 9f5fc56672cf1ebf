// The arguments of linear layers, checked.
#pragma once
#include "../checks.h"
#include "linear_work.h"

namespace zinit::cpu {

inline Scheme scheme_of(int64_t number, const char* name) {
  const Scheme scheme{number};
  ZINIT_CHECK(scheme.valid(), name,
              " must be 0 (a plain weight), or bits + 16 * has_min + 256 * group with bits 8 or 4, a min "
              "only with 4, "
              "and group 32, 64 or 128, got ",
              number);
  return scheme;
}

// A weight [rows, columns]: plain of the given dtype, or packed bytes.
inline LinearWeight weight_of(const Tensor& tensor, const char* name, int64_t rows, int64_t columns,
                              int64_t scheme, ScalarType dtype) {
  const Device device = Device::cpu();
  LinearWeight weight;
  weight.rows = rows, weight.columns = columns, weight.scheme = scheme_of(scheme, "scheme");
  ZINIT_CHECK(columns >= 1 && rows >= 0 && columns < (1 << 28) && rows < (1 << 28), name,
              " must have 1 to 2^28 columns and at most 2^28 rows, got ", rows, " x ", columns);
  if (weight.scheme.packed()) {
    const int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
    weight.data =
        device.array<void>(tensor, name, ScalarType::Byte, {panels, weight.scheme.panel_bytes(columns)}).data;
  } else {
    weight.data = device.array<void>(tensor, name, dtype, {rows, columns}).data;
    weight.dtype = dtype_of(tensor, name);
  }
  return weight;
}

}  // namespace zinit::cpu
