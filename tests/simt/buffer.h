// Memory of exact size, aligned as a GPU's is, for the sanitizers.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <random>

#include "../../csrc/cuda/elements.cuh"

template <class T>
struct Buffer {
  explicit Buffer(int64_t count) : size(static_cast<size_t>(count)) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, size * sizeof(T))) std::abort();
    data = static_cast<T*>(memory);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;

  void fill(std::minstd_rand& random) {  // sixteenths from -1 to 1: exact in every dtype
    for (size_t i = 0; i < size; ++i) {
      const auto sixteenths = static_cast<int>(random() % 33) - 16;
      data[i] = zinit::cuda::from_float<T>(static_cast<float>(sixteenths) / 16.f);
    }
  }

  T* data;
  size_t size;
};
