// Runs a sequence of stages, each of which reads what the one before it wrote, in one parallel region.
//
// Every thread has a run of neighbouring items of its own, which it reads from one end to the other; when it has none
// left, it takes items of the others. A stage is over when its items are done, whichever threads did them. So a thread
// that another process keeps from its core is waited for only while it holds an item, and the others take all that it
// leaves. A region per stage would cost 3 us each; a stage here costs 0.3.
//
// Who waits fetches the weights that it will read next into its level 2 cache: memory would be idle meanwhile. It does
// so for a few tens of microseconds, which is longer than an item takes, and then sleeps: its core is then free for
// the thread that it waits for.
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
  Bytes (*reads)(const Step&, int64_t item) = nullptr;  // or null
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
  step.reads = [](const Step& step, int64_t item) {
    return static_cast<const PreparedStage<Work>*>(step.stage)
        ->reads(*static_cast<const Work*>(step.work), item);
  };
  return step;
}

struct alignas(64) Counter {
  std::atomic<int32_t> value{0};
};

// The items of all steps, and who has taken how many.
class StepItems {
 public:
  StepItems(const std::vector<Step>& steps, int64_t threads)
      : steps_(steps),
        threads_(threads),
        counters_(std::make_unique<Counter[]>(steps.size() * static_cast<size_t>(threads + 1))) {}

  // The first item of the run of a thread.
  int64_t first(size_t step, int64_t thread) const { return steps_[step].items * thread / threads_; }

  // The next item of the run of `owner`; -1 where it has none left.
  int64_t take(size_t step, int64_t owner) {
    const int64_t begin = first(step, owner), end = first(step, owner + 1);
    std::atomic<int32_t>& taken = at(step, owner);
    if (taken.load(std::memory_order_relaxed) >= end - begin) return -1;
    const int64_t item = begin + taken.fetch_add(1, std::memory_order_relaxed);
    return item < end ? item : -1;
  }

  std::atomic<int32_t>& done(size_t step) { return at(step, threads_); }

 private:
  std::atomic<int32_t>& at(size_t step, int64_t counter) {
    return counters_[step * static_cast<size_t>(threads_ + 1) + static_cast<size_t>(counter)].value;
  }

  const std::vector<Step>& steps_;
  const int64_t threads_;
  std::unique_ptr<Counter[]> counters_;
};

// Fetches the first weights of a thread's run in the next step that reads weights.
class WeightsAhead {
 public:
  WeightsAhead(const std::vector<Step>& steps, const StepItems& items, int64_t thread)
      : steps_(steps), items_(items), thread_(thread) {}

  // Some more of them, while step `now` is not over.
  void fetch(size_t now) {
    if (step_ <= now) find(now + 1);
    for (int i = 0; i < kLines && at_ < end_; ++i, at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr int kLines = 4;                 // of 64 bytes, between two looks at the others
  static constexpr int64_t kMostBytes = 96 << 10;  // a small part of a level 2 cache

  void find(size_t from) {
    step_ = from, at_ = end_ = nullptr;
    while (step_ < steps_.size() && steps_[step_].reads == nullptr) ++step_;
    if (step_ == steps_.size()) return;
    const int64_t first = items_.first(step_, thread_), last = items_.first(step_, thread_ + 1);
    if (first == last) return;
    const Bytes bytes = steps_[step_].reads(steps_[step_], first);
    at_ = bytes.begin, end_ = at_ + std::min(bytes.count * (last - first), kMostBytes);
  }

  const std::vector<Step>& steps_;
  const StepItems& items_;
  const int64_t thread_;
  size_t step_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

inline void wait_until(const std::atomic<int32_t>& done, int32_t items, size_t step, WeightsAhead& ahead) {
  for (int i = 0; i < 2000; ++i) {
    if (done.load(std::memory_order_acquire) == items) return;
    ahead.fetch(step);
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
  const int64_t threads = std::min<int64_t>(most, torch::stable::get_num_threads());
  StepItems items(steps, threads);
  std::atomic<int64_t> joined{0};
  std::atomic<bool> complete{false};
  run_in_threads(threads, [&] {
    void* scratch = thread_scratch(bytes);
    if (bytes > 0 && scratch == nullptr) return;  // the other threads do all
    const int64_t thread = joined.fetch_add(1, std::memory_order_relaxed);
    WeightsAhead ahead(steps, items, thread);
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step& step = steps[i];
      std::atomic<int32_t>& done = items.done(i);
      const auto all = static_cast<int32_t>(step.items);
      bool prepared = step.prepare == nullptr;
      for (int64_t turn = 0; turn < threads; ++turn) {
        const int64_t owner = (thread + turn) % threads;
        for (int64_t item; (item = items.take(i, owner)) >= 0;) {
          if (!prepared) step.prepare(step, scratch);
          prepared = true;
          step.run(step, item, scratch);
          if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == all) done.notify_all();
        }
      }
      wait_until(done, all, i, ahead);
    }
    complete = true;
  });
  ZINIT_CHECK(complete, "out of memory: a thread needs ", bytes, " bytes of scratch");
}

}  // namespace zinit::cpu
