// mma.m16n8k16 and ldmatrix on the registers of 32 lanes, layouts as in the PTX ISA; compiled without
// sanitizers.
#include <cstring>
#include <utility>

#include "simt_device.h"

namespace simt {
namespace {

float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

float from_fp16(uint16_t bits) {
  __half_raw raw;
  raw.x = bits;
  return __half2float(__half(raw));
}

template <float (*from_bits)(uint16_t)>
void compute_mma(void** slots) {
  float a[16][16], b[16][8];
  const auto half_of = [](uint32_t word, int i) {
    return from_bits(static_cast<uint16_t>(word >> 16 * (i % 2)));
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto* m = static_cast<Mma*>(slots[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 8; ++i) a[group + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] = half_of(m->a[i / 2], i);
    for (int i = 0; i < 4; ++i) b[pair + i % 2 + i / 2 * 8][group] = half_of(m->b[i / 2], i);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* m = static_cast<Mma*>(slots[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) m->c[i] += a[row][k] * b[k][column];
    }
  }
}

uint64_t g_bank_conflicts;

void load(void** slots, bool transposed) {
  const auto slot = [&](int lane) { return static_cast<Matrices*>(slots[lane]); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    int times_met[8] = {};  // 16-byte columns of the banks
    for (int row = 0; row < 8; ++row) {
      const auto address = reinterpret_cast<uintptr_t>(slot(matrix * 8 + row)->address);
      if (times_met[address / 16 % 8]++) ++g_bank_conflicts;
    }
    for (int lane = 0; lane < 32; ++lane) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int group = lane / 4, place = lane % 4 * 2 + i;
        const int row = transposed ? place : group, column = transposed ? group : place;
        std::memcpy(&pair[i], reinterpret_cast<const char*>(&slot(matrix * 8 + row)->row) + column * 2, 2);
      }
      slot(lane)->to[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

}  // namespace

uint64_t bank_conflicts() { return std::exchange(g_bank_conflicts, 0); }
void compute_matrices(void** slots, unsigned) { load(slots, false); }
void compute_matrices_transposed(void** slots, unsigned) { load(slots, true); }
void compute_mma_bf16(void** slots, unsigned) { compute_mma<from_bf16>(slots); }
void compute_mma_fp16(void** slots, unsigned) { compute_mma<from_fp16>(slots); }

}  // namespace simt
