// The one header between a kernel and its compiler: all inline PTX, one function each, and how a kernel is
// launched. nvcc reads what stands here; a plain C++ compiler gets the same names for the emulator of
// tests/simt.
#pragma once
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define ZINIT_UNPAREN(...) __VA_ARGS__
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (ZINIT_UNPAREN kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
// The same for a kernel whose threads all call wait_for_launch_before: its blocks may take their places while
// the launch before it, on this stream, still runs.
#define LAUNCH_BEHIND(kernel, grid, block, shared_bytes, stream, ...) \
  ::zinit::cuda::launch_behind((ZINIT_UNPAREN kernel), (grid), (block), (shared_bytes), (stream), __VA_ARGS__)
// More than 48 KB of shared memory must be asked for. False where it is refused: then cudaGetLastError says
// why.
#define ALLOW_SHARED(kernel, bytes)                                                          \
  (cudaFuncSetAttribute((ZINIT_UNPAREN kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, \
                        static_cast<int>(bytes)) == cudaSuccess)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace zinit::cuda {

// Compiled for older chips a kernel has no such wait, also where a newer chip runs its PTX: it is launched as
// any other.
template <class... Parameters, class... Arguments>
void launch_behind(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  constexpr int kFirstThatWaits = 90;
  cudaFuncAttributes compiled{};
  const bool waits =
      cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess && compiled.ptxVersion >= kFirstThatWaits;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes,
  config.stream = stream;
  config.attrs = &overlap, config.numAttrs = waits ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Once every block of this launch has come here or ended, one LAUNCH_BEHIND it may begin.
__device__ __forceinline__ void let_launch_behind_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}

// Until the launch before has ended, and all that it wrote can be read.
__device__ __forceinline__ void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// 16 bytes of global or shared memory, 16-byte aligned. Volatile: several stay one after another, ahead of
// the products that need them, and so are on their way together.
__device__ __forceinline__ uint4 load_vector(const void* address) {
  uint4 v;
  asm volatile("ld.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

// 2^x; -inf gives 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, both 16-byte aligned, there after the wait for their group; zeros
// where not wanted, and then nothing is read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
               "r"(wanted ? 16 : 0)
               : "memory");
}

// What this thread has begun to copy becomes a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until at most the newest GROUPS groups of this thread are on their way.
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(GROUPS) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane l gives the address of row l % 8 of matrix
// l / 8 and gets of each matrix elements [l / 4][l % 4 * 2, +1].
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same matrices transposed: elements [l % 4 * 2, +1][l / 4].
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8] over a warp; T is __nv_bfloat16 or __half. With group = lane / 4 and
// pair = lane % 4 * 2, a lane holds a[group (+8)][pair, +1 (+8, +9)], b[pair, +1 (+8, +9)][group] and
// c[group (+8)][pair, +1]. Volatile: all lanes have to meet at it, so no copy of it may move into a branch.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace zinit::cuda
#else
#include "simt_device.h"
#endif
