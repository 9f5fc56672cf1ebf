// The words of CUDA C++ for a plain host compiler: a kernel runs on the CPU, one fiber per CUDA thread, so
// that its logic is tested where there is no GPU. The scheduler is simt_rt.cpp; csrc/cuda/device.cuh includes
// simt_device.h.
//
// A warp operation (shuffle, vote, __syncwarp, mma) is one collective: lanes leave their arguments, the last
// to arrive computes for all. Lanes that meet at different ones, a block whose threads wait at different
// barriers, a lane that waits for one that has gone: each is an error that names block, thread, file and
// line.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#ifndef SIMT_TSAN
#define SIMT_TSAN 0
#endif

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// What computes for a whole warp reads other fibers' arguments: not an access that a kernel makes.
#define SIMT_UNSANITIZED __attribute__((no_sanitize("thread", "address", "undefined")))
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

using cudaStream_t = struct CUstream_st*;

namespace simt {

struct Thread {  // what a CUDA thread knows of itself
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  int linear, lane, warp;
};
extern Thread* current;

struct Collective {
  const char* kind;
  unsigned mask;
  bool orders_memory;
  const char* file;
  int line;
};

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void sync_block(const char* file, int line);
void run_collective(const Collective& what, void* arguments, void (*compute)(void**, unsigned));
void* dynamic_shared();
void require_shared(const void* pointer, size_t bytes, const char* what);
void forget_copies();
void allow_shared(const void* kernel, size_t bytes);
void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            void (*body)(void*), void* call);

template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto body = [](void* pointer) {
    auto* c = static_cast<Call*>(pointer);
    std::apply(c->kernel, c->arguments);
  };
  launch(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, body, &call);
}

template <class T>
struct Shuffle {
  T in, out;
  int source;
};

template <class T>
SIMT_UNSANITIZED void compute_shuffle(void** slots, unsigned mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto* mine = static_cast<Shuffle<T>*>(slots[lane]);
    if (!(mask >> mine->source & 1)) {
      fail("shuffle: lane %d reads lane %d, which is not in mask %08x", lane, mine->source, mask);
    }
    mine->out = static_cast<Shuffle<T>*>(slots[mine->source])->in;
  }
}

template <class T>
SIMT_UNSANITIZED T shuffle(const char* kind, unsigned mask, T value, int source, const char* file, int line) {
  Shuffle<T> slot{value, value, source};
  run_collective({kind, mask, false, file, line}, &slot, compute_shuffle<T>);
  return slot.out;
}

}  // namespace simt

#define threadIdx (::simt::current->thread)
#define blockIdx (::simt::current->block)
#define blockDim (::simt::current->block_dim)
#define gridDim (::simt::current->grid_dim)

inline void __syncthreads(SIMT_HERE) { simt::sync_block(file, line); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_HERE) {
  simt::run_collective({"__syncwarp", mask, true, file, line}, nullptr, nullptr);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, SIMT_HERE) {
  return simt::shuffle("__shfl_sync", mask, value, source & 31, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, SIMT_HERE) {
  return simt::shuffle("__shfl_xor_sync", mask, value, simt::current->lane ^ distance, file, line);
}

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
