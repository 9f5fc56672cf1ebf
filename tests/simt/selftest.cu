// The emulator's own tests: what works is compared with the plain computation, what is wrong must be
// reported.
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/decode/work.cuh"
#include "selftest.h"

namespace {

using namespace zinit::cuda;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

__global__ void reverse_block(const float* in, float* out) {
  DYNAMIC_SHARED(memory);
  auto* values = reinterpret_cast<float*>(memory);
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] =
      values[blockDim.x - 1 - threadIdx.x] + static_cast<float>(blockIdx.x);
}

__global__ void sum_warps(const float* in, float* out) {
  float sum = in[threadIdx.x];
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  out[threadIdx.x] = sum + __shfl_sync(~0u, in[threadIdx.x], 5);
}

template <class T>
__global__ void multiply(const T* a, const T* b, float* c) {  // [16, 16] [16, 8]
  const unsigned lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
  const auto two = [](T low, T high) { return pack<T>(to_float(low), to_float(high)); };
  uint32_t fragments[4];
  for (unsigned i = 0; i < 4; ++i) {
    const T* at = a + (group + i % 2 * 8) * 16 + pair + i / 2 * 8;
    fragments[i] = two(at[0], at[1]);
  }
  const T* column = b + group;
  float sums[4] = {1.f, 1.f, 1.f, 1.f};
  mma_m16n8k16<T>(sums, fragments, two(column[pair * 8], column[(pair + 1) * 8]),
                  two(column[(pair + 8) * 8], column[(pair + 9) * 8]));
  for (unsigned i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + pair + i % 2] = sums[i];
}

__global__ void read_unwritten_shared(float* out) {
  DYNAMIC_SHARED(memory);
  out[threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
}

__global__ void exit_before_barrier(float* out) {
  if (threadIdx.x >= 64) return;
  __syncthreads();
  out[threadIdx.x] = 1.f;
}

__global__ void two_barriers() {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_with_exited_lane() {
  if (threadIdx.x == 5) return;
  __shfl_xor_sync(~0u, 1, 1);
}

__global__ void shuffle_from_outside_the_mask() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}

__global__ void call_from_outside_the_mask() { __shfl_sync(0xffffu, 1, 0); }

__global__ void diverged_warp() {
  if (threadIdx.x < 16) {
    __shfl_sync(~0u, 1, 0);
  } else {
    __syncwarp();
  }
}

__global__ void wait_for_each_other() {
  if (threadIdx.x == 40) __syncwarp();
  __syncthreads();
}

__global__ void exit_while_awaited() {
  if (threadIdx.x != 5) __syncwarp();
}

__global__ void load_misaligned(const float* in, float* out) {
  out[threadIdx.x] = static_cast<float>(load_vector(in + 1).x);
}

__global__ void nothing() {}

__global__ void half_wait() {
  if (threadIdx.x % 2) grid_dependency_synchronize();
}

std::vector<float> ramp(int count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) values[static_cast<size_t>(i)] = static_cast<float>(i % 7 - 3);
  return values;
}

template <class T>
void compare_mma() {
  std::vector<T> a(256), b(128);
  for (size_t i = 0; i < a.size(); ++i)
    a[i] = from_float<T>(static_cast<float>(static_cast<int>(i * 37 % 23) - 11));
  for (size_t i = 0; i < b.size(); ++i)
    b[i] = from_float<T>(static_cast<float>(static_cast<int>(i * 29 % 19) - 9));
  std::vector<float> c(128, NAN);
  LAUNCH((multiply<T>), dim3(1), dim3(32), 0, nullptr, a.data(), b.data(), c.data());
  for (size_t i = 0; i < 16; ++i) {
    for (size_t j = 0; j < 8; ++j) {
      float expected = 1.f;
      for (size_t k = 0; k < 16; ++k) expected += to_float(a[i * 16 + k]) * to_float(b[k * 8 + j]);
      require(c[i * 8 + j] == expected, "mma differs from the plain product");
    }
  }
}

void compare_shuffles() {
  const auto in = ramp(64);
  std::vector<float> out(64, NAN);
  LAUNCH((sum_warps), dim3(1), dim3(64), 0, nullptr, in.data(), out.data());
  for (size_t warp = 0; warp < 2; ++warp) {
    float expected = in[warp * 32 + 5];
    for (size_t i = 0; i < 32; ++i) expected += in[warp * 32 + i];
    for (size_t i = 0; i < 32; ++i) require(out[warp * 32 + i] == expected, "shuffles sum to something else");
  }
}

void compare_barriers() {
  const auto in = ramp(128);
  std::vector<float> out(384, NAN);
  LAUNCH((reverse_block), dim3(3), dim3(128), 512, nullptr, in.data(), out.data());
  for (size_t i = 0; i < 384; ++i) {
    require(out[i] == in[127 - i % 128] + static_cast<float>(i / 128), "a block reversed wrongly");
  }
  LAUNCH((exit_before_barrier), dim3(1), dim3(128), 0, nullptr, out.data());
  for (size_t i = 0; i < 64; ++i) require(out[i] == 1.f, "threads that exited held a barrier");
}

void compare_shared_poison() {
  std::vector<float> out(32, 0.f);
  LAUNCH((read_unwritten_shared), dim3(1), dim3(32), 128, nullptr, out.data());
  for (const float value : out) require(std::isnan(value), "shared memory does not start as NaN");
}

void compare_divider() {
  for (int divisor = 1; divisor < 70; ++divisor) {
    const Divider by = Divider::by(divisor);
    for (const int n : {0, 1, divisor - 1, divisor, divisor + 1, 4095, 123456789, 2147483646, 2147483647}) {
      require(by.quotient(n) == n / divisor, std::to_string(n) + " / " + std::to_string(divisor));
    }
  }
}

void compare_byte_perm() {
  require(__byte_perm(0x33221100, 0x77665544, 0x5410) == 0x55441100, "byte_perm of the low halves");
  require(__byte_perm(0x33221100, 0x77665544, 0x7632) == 0x77663322, "byte_perm of the high halves");
}

}  // namespace

void selftest(const char* name) {
  float out[128] = {};
  alignas(16) const float in[8] = {};
  const std::string test = name;
  if (test == "mma") return compare_mma<bf16>(), compare_mma<fp16>();
  if (test == "shuffles") return compare_shuffles();
  if (test == "barriers") return compare_barriers();
  if (test == "shared_poison") return compare_shared_poison();
  if (test == "divider") return compare_divider();
  if (test == "byte_perm") return compare_byte_perm();
  const auto run = [](auto* kernel, unsigned threads) {
    LAUNCH((kernel), dim3(1), dim3(threads), 0, nullptr);
  };
  if (test == "two_barriers") return run(two_barriers, 128);
  if (test == "shuffle_with_exited_lane") return run(shuffle_with_exited_lane, 32);
  if (test == "shuffle_from_outside_the_mask") return run(shuffle_from_outside_the_mask, 32);
  if (test == "call_from_outside_the_mask") return run(call_from_outside_the_mask, 32);
  if (test == "diverged_warp") return run(diverged_warp, 32);
  if (test == "wait_for_each_other") return run(wait_for_each_other, 64);
  if (test == "exit_while_awaited") return run(exit_while_awaited, 32);
  if (test == "too_many_threads") return run(nothing, 2048);
  if (test == "without_a_wait")
    return LAUNCH_PROGRAMMATIC_DEPENDENT((half_wait), dim3(2), dim3(64), 0, nullptr);
  if (test == "bad_grid") return LAUNCH((nothing), dim3(1, 65536), dim3(1), 0, nullptr);
  if (test == "too_much_shared") return LAUNCH((nothing), dim3(1), dim3(1), 65536, nullptr);
  if (test == "too_much_asked_for") return (void)ALLOW_SHARED((nothing), 300000);
  if (test == "no_shared") return LAUNCH((read_unwritten_shared), dim3(1), dim3(1), 0, nullptr, out);
  if (test == "misaligned") return LAUNCH((load_misaligned), dim3(1), dim3(1), 0, nullptr, in, out);
  throw std::runtime_error("no test of this name: " + test);
}
