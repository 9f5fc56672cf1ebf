// Runs a stage on torch's own threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "../checks.h"
#include "kernels.h"

namespace zinit::cpu {

// A thread's scratch, kept between calls: freshly mapped pages cost more than the arithmetic of a small
// problem.
inline void* thread_scratch(int64_t bytes) {
  constexpr int64_t kAlignment = 64;
  thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    memory.reset();
    memory.reset(std::aligned_alloc(kAlignment, static_cast<size_t>(rounded)));
    capacity = memory ? rounded : 0;
  }
  return memory.get();
}

// Threads take the next item from a counter, because causal query blocks and ragged sequences cost unequal
// amounts. Which thread runs an item never changes its result.
template <class Work>
void run_stage(const Stage<Work>& stage, const Work& work) {
  const int64_t items = stage.items(work);
  if (items == 0) return;
  const int64_t bytes = stage.scratch_bytes(work);
  const int64_t threads = std::min<int64_t>(items, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  // An exception thrown inside parallel_for loses its text, so failure is reported after it.
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    void* scratch = thread_scratch(bytes);
    if (bytes > 0 && scratch == nullptr) {
      out_of_memory = true;
      return;
    }
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      stage.run(work, item, item + 1, scratch);
    }
  });
  ZINIT_CHECK(!out_of_memory, "out of memory: a thread needs ", bytes, " bytes of scratch");
}

}  // namespace zinit::cpu
