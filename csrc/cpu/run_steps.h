// Runs a sequence of stages, each of which reads what the one before it wrote, in one parallel region.
//
// A stage is over when its items are done, whichever threads did them. So a thread that another process keeps
// from its core is waited for only while it holds an item, and the others take all that it leaves. Who waits
// spins for a few tens of microseconds, which is longer than an item takes, and then sleeps: its core is then
// free for the thread that it waits for. A region per stage would cost 3 us each; a stage here costs 0.3.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "run_stage.h"

namespace zinit::cpu {

// One stage and its parameters. Both must outlive it.
struct Step {
  int64_t items = 0;
  int64_t scratch_bytes = 0;
  const void* stage = nullptr;
  const void* work = nullptr;
  void (*prepare)(const Step&, void* scratch) = nullptr;  // or null
  void (*run)(const Step&, int64_t item, void* scratch) = nullptr;
};

template <class Work>
Step step_of(const Stage<Work>& stage, const Work& work) {
  Step step{stage.items(work), stage.scratch_bytes(work), &stage, &work};
  step.run = [](const Step& step, int64_t item, void* scratch) {
    static_cast<const Stage<Work>*>(step.stage)
        ->run(*static_cast<const Work*>(step.work), item, item + 1, scratch);
  };
  return step;
}

template <class Work>
Step step_of(const PreparedStage<Work>& stage, const Work& work) {
  Step step = step_of(static_cast<const Stage<Work>&>(stage), work);
  step.stage = &stage;
  step.prepare = [](const Step& step, void* scratch) {
    static_cast<const PreparedStage<Work>*>(step.stage)
        ->prepare(*static_cast<const Work*>(step.work), scratch);
  };
  step.run = [](const Step& step, int64_t item, void* scratch) {
    static_cast<const PreparedStage<Work>*>(step.stage)
        ->run(*static_cast<const Work*>(step.work), item, item + 1, scratch);
  };
  return step;
}

struct alignas(64) StepCounter {
  std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int32_t> done{0};
};

inline void wait_until(const std::atomic<int32_t>& done, int32_t items) {
  for (int i = 0; i < 2000; ++i) {
    if (done.load(std::memory_order_acquire) == items) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  for (int32_t found; (found = done.load(std::memory_order_acquire)) != items;) {
    done.wait(found, std::memory_order_acquire);
  }
}

inline void run_steps(const std::vector<Step>& steps) {
  int64_t most = 0, bytes = 0;
  for (const Step& step : steps) {
    most = std::max(most, step.items);
    bytes = std::max(bytes, step.scratch_bytes);
  }
  if (most == 0) return;
  const auto counters = std::make_unique<StepCounter[]>(steps.size());
  const int64_t threads = std::min<int64_t>(most, torch::stable::get_num_threads());
  std::atomic<bool> complete{false};
  run_in_threads(threads, [&] {
    void* scratch = thread_scratch(bytes);
    if (bytes > 0 && scratch == nullptr) return;  // the other threads do all
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step& step = steps[i];
      StepCounter& counter = counters[i];
      const auto items = static_cast<int32_t>(step.items);
      bool prepared = step.prepare == nullptr;
      for (int64_t item; (item = counter.next.fetch_add(1, std::memory_order_relaxed)) < step.items;) {
        if (!prepared) step.prepare(step, scratch);
        prepared = true;
        step.run(step, item, scratch);
        if (counter.done.fetch_add(1, std::memory_order_acq_rel) + 1 == items) counter.done.notify_all();
      }
      wait_until(counter.done, items);
    }
    complete = true;
  });
  ZINIT_CHECK(complete, "out of memory: a thread needs ", bytes, " bytes of scratch");
}

}  // namespace zinit::cpu
