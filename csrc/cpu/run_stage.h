// Runs a stage on torch's own threads.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

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

// Whether this process was made by fork() from one that had this library loaded.
inline bool was_forked() {
  static std::atomic<bool> forked{false};
  [[maybe_unused]] static const int registered =
      pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
  return forked.load(std::memory_order_relaxed);
}
inline const bool kWatchesForks = was_forked();  // from the moment when the library is loaded

// Calls task() in `count` threads at once, this one included.
//
// fork() copies no threads but the one that called it. OpenMP, which torch's pool is made of, does not notice:
// in a child it waits for ever for the threads of its parent, and one small call of an operator in the parent
// is enough for that. A child therefore starts threads of its own for each stage (20 us each).
template <class Task>
void run_in_threads(int64_t count, const Task& task) {
  if (count <= 1 || !was_forked()) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) { task(); });
    return;
  }
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(count - 1));
  try {
    for (int64_t i = 1; i < count; ++i) others.emplace_back(task);
  } catch (const std::system_error&) {  // no more threads may be started: those that were do the work
  }
  task();
  for (std::thread& other : others) other.join();
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
  run_in_threads(threads, [&] {
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
