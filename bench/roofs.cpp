// What this CPU can do at most: multiply-adds in registers, and reads of a buffer, on all threads.
// bench/machine.py compiles this file for the instruction set that torch uses and calls it through ctypes.
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef std::uint64_t Words __attribute__((vector_size(kVectorBytes)));

// Independent sums: two units with a latency of up to 6 cycles need 12, and 16 registers can hold them.
constexpr int kSums = 12;
constexpr int kFloats = kVectorBytes / 4;

// Results go here, so that the compiler cannot leave out the work.
volatile float float_sink;
volatile std::uint64_t word_sink;

// Hides a value from the compiler: it must assume that any bits may be in it.
template <typename Value>
void hide(Value& value) {
  asm volatile("" : "+m"(value));
}

template <typename Function>
void on_threads(int threads, Function function) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(function, i);
  function(0);
  for (std::thread& other : others) other.join();
}

// sum = sum * factor + term stays near 2, so no operand becomes denormal or infinite.
void multiply_add(std::int64_t iterations) {
  Floats sums[kSums], factor = {}, term = {};
  for (Floats& sum : sums) hide(sum = Floats{});
  hide(factor += 0.5f);
  hide(term += 1.0f);
  for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (Floats& sum : sums) sum = sum * factor + term;
  }
  Floats total = {};
  for (const Floats& sum : sums) total += sum;
  float_sink = total[0];
}

#if defined(__AVX512BF16__)
void multiply_add_bfloat16(std::int64_t iterations) {
  __m512 sums[kSums];
  for (__m512& sum : sums) hide(sum = _mm512_setzero_ps());
  __m512bh left = (__m512bh)_mm512_set1_epi16(0x3c00), right = left;  // 2^-7
  hide(left);
  hide(right);
  for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, left, right);
  }
  __m512 total = _mm512_setzero_ps();
  for (const __m512& sum : sums) total = _mm512_add_ps(total, sum);
  float_sink = _mm512_cvtss_f32(total);
}
#endif

void read(const Words* first, std::size_t count, std::int64_t passes) {
  constexpr int kUnroll = 8;
  Words sums[kUnroll] = {};
  for (std::int64_t pass = 0; pass < passes; ++pass) {
    for (std::size_t i = 0; i + kUnroll <= count; i += kUnroll) {
#pragma GCC unroll 8
      for (int j = 0; j < kUnroll; ++j) sums[j] ^= first[i + j];
    }
    asm volatile("" ::: "memory");  // the next pass reads again
  }
  Words total = {};
  for (const Words& sum : sums) total ^= sum;
  word_sink = total[0];
}

}  // namespace

// Each returns how much was done: floating-point operations, or bytes read.

extern "C" double zinit_roof_float32(std::int64_t iterations, int threads) {
  on_threads(threads, [=](int) { multiply_add(iterations); });
  return 2.0 * kFloats * kSums * iterations * threads;
}

// 0 without a bfloat16 dot product: such a CPU multiplies in float32.
extern "C" double zinit_roof_bfloat16(std::int64_t iterations, int threads) {
#if defined(__AVX512BF16__)
  on_threads(threads, [=](int) { multiply_add_bfloat16(iterations); });
  return 4.0 * kFloats * kSums * iterations * threads;
#else
  return 0.0 * iterations * threads;
#endif
}

// `data` is aligned to 64 bytes; `bytes` is a multiple of 512 per thread.
extern "C" double zinit_roof_read(const void* data, std::int64_t bytes, std::int64_t passes, int threads) {
  const std::int64_t share = bytes / threads / 512 * 512;
  on_threads(threads, [=](int i) {
    const char* first = static_cast<const char*>(data) + i * share;
    read(reinterpret_cast<const Words*>(first), share / sizeof(Words), passes);
  });
  return static_cast<double>(share) * threads * passes;
}
