// The one header between a kernel and its compiler: all inline PTX, one function each, and how a kernel is
// launched. nvcc reads what stands here. A plain C++ compiler gets the same names from the emulator of
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
// Programmatic dependent launch: the blocks of this kernel may start while the launch before it on the stream
// still runs. All threads of the kernel must call grid_dependency_synchronize.
#define LAUNCH_PROGRAMMATIC_DEPENDENT(kernel, grid, block, shared_bytes, stream, ...)                   \
  ::zinit::cuda::launch_programmatic_dependent((ZINIT_UNPAREN kernel), (grid), (block), (shared_bytes), \
                                               (stream), __VA_ARGS__)
// More than 48 KB of shared memory must be asked for. False where it is refused; cudaGetLastError then says
// why.
#define ALLOW_SHARED(kernel, bytes)                                                          \
  (cudaFuncSetAttribute((ZINIT_UNPAREN kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, \
                        static_cast<int>(bytes)) == cudaSuccess)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace zinit::cuda {

// A kernel that was compiled for older chips has no such wait, even where a newer chip runs its PTX. It is
// launched like any other.
template <class... Parameters, class... Arguments>
void launch_programmatic_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                                   cudaStream_t stream, const Arguments&... arguments) {
  constexpr int kFirstVersion = 90;
  cudaFuncAttributes compiled{};
  const bool synchronizes =
      cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess && compiled.ptxVersion >= kFirstVersion;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes,
  config.stream = stream;
  config.attrs = &overlap, config.numAttrs = synchronizes ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

// As cudaTriggerProgrammaticLaunchCompletion: once every block of this launch has called it or ended, the
// dependent launch may begin.
__device__ __forceinline__ void trigger_programmatic_launch_completion() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}

// As cudaGridDependencySynchronize: waits until the launch before has ended and all that it wrote can be
// read.
__device__ __forceinline__ void grid_dependency_synchronize() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// 16 bytes of global or shared memory, 16-byte aligned. Volatile, so that several loads stay one after
// another, ahead of the products that need them: then they are in flight together.
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

// Starts a copy of 16 bytes from global to shared memory, both 16-byte aligned. It is complete after the wait
// for its group. Where not wanted, zeros are written and nothing is read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
               "r"(wanted ? 16 : 0)
               : "memory");
}

// The copies that this thread has started become a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most the newest GROUPS groups of this thread are in flight.
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(GROUPS) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 of matrix
// l / 8, and gets elements [l / 4][l % 4 * 2, +1] of each matrix.
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

// c [16, 8] += a [16, 16] b [16, 8] over a warp; T is __nv_bfloat16 or __half. With group = lane / 4 and pair
// = lane % 4 * 2, a lane holds a[group (+8)][pair, +1 (+8, +9)], b[pair, +1 (+8, +9)][group] and c[group
// (+8)][pair, +1]. Volatile: all lanes must execute it together, so no copy of it may move into a branch.
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
