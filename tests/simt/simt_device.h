// The host twins of csrc/cuda/device.cuh: same names, same arguments, for the fibers of simt_rt.cpp.
#pragma once
#include "simt_host.h"

#define ZINIT_UNPAREN(...) __VA_ARGS__
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                           \
  ((void)(stream), simt::launch_kernel(#kernel, (ZINIT_UNPAREN kernel), (grid), (block), \
                                       (shared_bytes)__VA_OPT__(, ) __VA_ARGS__))
#define LAUNCH_PROGRAMMATIC_DEPENDENT(kernel, grid, block, shared_bytes, stream, ...)                     \
  (simt::begin_dependent(), LAUNCH(kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__), \
   simt::require_waits(#kernel, (grid), (block)))
#define ALLOW_SHARED(kernel, bytes)                                                                       \
  (simt::allow_shared(reinterpret_cast<const void*>((ZINIT_UNPAREN kernel)), static_cast<size_t>(bytes)), \
   true)
#define DYNAMIC_SHARED(name) unsigned char* name = static_cast<unsigned char*>(simt::dynamic_shared())

namespace simt {

struct Mma {
  uint32_t a[4], b[2];
  float c[4];
};
void compute_mma_bf16(void** slots, unsigned mask);
void compute_mma_fp16(void** slots, unsigned mask);

struct Matrices {
  uint4 row;  // 8 elements
  const void* address;
  uint32_t to[4];
};
uint64_t bank_conflicts();  // of the ldmatrix since the last question
void compute_matrices(void** slots, unsigned mask);
void compute_matrices_transposed(void** slots, unsigned mask);

void begin_dependent();
void note_wait();
void require_waits(const char* name, dim3 grid, dim3 block);

struct Copy {
  void* to;
  const void* from;
  bool wanted;
  unsigned group;
};
bool copies_land_late();
void note_copy(const Copy& copy);
void commit_copies();
bool next_copy(unsigned groups_on_their_way, Copy* copy);

}  // namespace simt

namespace zinit::cuda {

// Blocks of two launches never run at once here: what is checked is that every thread waits.
inline void trigger_programmatic_launch_completion() {}
inline void grid_dependency_synchronize() { simt::note_wait(); }

// Here in the kernel's translation unit, and a plain load, so that the sanitizers judge it.
inline uint4 load_vector(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16)
    simt::fail("16-byte load from %p, which is misaligned", address);
  return *static_cast<const uint4*>(address);
}

// In the kernel's translation unit too. Late, a copy lands only when it is waited for; otherwise at once.
// Both are what a GPU may do: one finds a missing wait, the other a buffer that is overwritten too early.
// Under the thread sanitizer both happen.
inline void land(const simt::Copy& copy) {
  *static_cast<uint4*>(copy.to) =
      copy.wanted ? *static_cast<const uint4*>(copy.from) : make_uint4(0, 0, 0, 0);
}

inline void copy_async(void* to, const void* from, bool wanted) {
  simt::require_shared(to, 16, "cp.async");
  if (reinterpret_cast<uintptr_t>(from) % 16) {
    simt::fail("16-byte copy from %p, which is misaligned", from);
  }
  const simt::Copy copy{to, from, wanted, 0};
  if (!simt::copies_land_late() || SIMT_TSAN) land(copy);
  if (simt::copies_land_late()) simt::note_copy(copy);
}

inline void commit_copies() { simt::commit_copies(); }

template <int GROUPS>
void wait_for_copies() {
  for (simt::Copy copy; simt::next_copy(GROUPS, &copy);) land(copy);
}

inline void load_matrices_with(uint32_t (&to)[4], const void* row, const char* kind,
                               void (*compute)(void**, unsigned), const char* file, int line) {
  simt::require_shared(row, 16, kind);
  simt::Matrices slot{*static_cast<const uint4*>(row), row, {}};
  simt::run_collective({kind, ~0u, false, file, line}, &slot, compute);
  for (int i = 0; i < 4; ++i) to[i] = slot.to[i];
}

inline void load_matrices(uint32_t (&to)[4], const void* row, SIMT_HERE) {
  load_matrices_with(to, row, "ldmatrix", simt::compute_matrices, file, line);
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row, SIMT_HERE) {
  load_matrices_with(to, row, "ldmatrix.trans", simt::compute_matrices_transposed, file, line);
}

inline float fast_exp2(float x) { return exp2f(x); }

template <class T>
SIMT_UNSANITIZED void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   SIMT_HERE) {
  simt::Mma slot{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  constexpr auto compute = std::is_same_v<T, __nv_bfloat16> ? simt::compute_mma_bf16 : simt::compute_mma_fp16;
  simt::run_collective({"mma.m16n8k16", ~0u, false, file, line}, &slot, compute);
  for (int i = 0; i < 4; ++i) c[i] = slot.c[i];
}

}  // namespace zinit::cuda
