// The host twins of csrc/cuda/device.cuh: same names, same arguments, for the fibers of simt_rt.cpp.
#pragma once
#include "simt_host.h"

#define ZINIT_UNPAREN(...) __VA_ARGS__
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                           \
  ((void)(stream), simt::launch_kernel(#kernel, (ZINIT_UNPAREN kernel), (grid), (block), \
                                       (shared_bytes)__VA_OPT__(, ) __VA_ARGS__))
#define ALLOW_SHARED(kernel, bytes) \
  simt::allow_shared(reinterpret_cast<const void*>((ZINIT_UNPAREN kernel)), static_cast<size_t>(bytes))
#define DYNAMIC_SHARED(name) unsigned char* name = static_cast<unsigned char*>(simt::dynamic_shared())

namespace simt {

struct Mma {
  uint32_t a[4], b[2];
  float c[4];
};
void compute_mma_bf16(void** slots, unsigned mask);
void compute_mma_fp16(void** slots, unsigned mask);

}  // namespace simt

namespace zinit::cuda {

// Here in the kernel's translation unit, and a plain load, so that the sanitizers judge it.
inline uint4 load_streaming(const void* address, bool wanted) {
  if (!wanted) return make_uint4(0, 0, 0, 0);
  if (reinterpret_cast<uintptr_t>(address) % 16)
    simt::fail("16-byte load from %p, which is misaligned", address);
  return *static_cast<const uint4*>(address);
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
