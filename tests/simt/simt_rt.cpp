// The scheduler of the emulator: fibers, barriers, collectives, blocks one after another. Compiled WITHOUT
// -fsanitize (SIMT_TSAN or SIMT_ASAN is defined instead), so that only the kernels' own accesses are judged.
//
// SIMT_SCHEDULE=forward|reverse|random<seed> permutes threads and blocks; a correct kernel gives the same
// bits. Shared memory is fresh for every block and full of NaN. Under the thread sanitizer memory is ordered
// by barriers and __syncwarp alone, and blocks never with each other: a race check.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "simt_host.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#ifndef __x86_64__
#include <ucontext.h>  // 11 times slower than the switch below
#define SIMT_UCONTEXT 1
#else
#define SIMT_UCONTEXT 0
#endif
#if SIMT_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#if SIMT_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
Thread* current = nullptr;

namespace {

constexpr size_t kStackBytes = (SIMT_TSAN ? 64 : 256) << 10, kGuardBytes = 4096;
constexpr size_t kSharedBytes = 48 << 10;      // what a block has without asking
constexpr size_t kMaxSharedBytes = 227 << 10;  // sm_90
constexpr int kThreadsAtMost = 1024, kWarpsAtMost = 32;

enum class State { kReady, kAtBarrier, kAtCollective, kDone };
enum class Schedule { kForward, kReverse, kRandom };

struct Fiber {
  Thread thread;  // first: Thread* and Fiber* are one address
  State state;
  void* stack_pointer;
  char* stack;
#if SIMT_UCONTEXT
  ucontext_t context;
#endif
  void *fake_stack = nullptr, *tsan = nullptr;
  Collective waits_for;
  char padding[192];  // fibers of equal stack offsets would share cache sets
};

struct Pending {
  Collective what;
  unsigned arrived;
  void* slot[32];
};

struct Warp {
  unsigned alive;
  int count;  // of the pending ones
  Pending* pending[32];
  Pending storage[32];
};

struct Runtime {
  std::vector<std::unique_ptr<Fiber>> pool;
  int threads, live, waiting;
  Warp warps[kWarpsAtMost];
  int ready[kThreadsAtMost];
  unsigned head, count;  // ring of thread numbers

  const char* name;
  void (*body)(void*);
  void* call;
  char error[2048];

  char* shared = nullptr;
  size_t shared_bytes;
  std::unordered_map<const void*, size_t> allowed;

  Schedule schedule;
  uint64_t random;
  uint64_t favours;  // of the random schedule, this block's order of warps

#if SIMT_UCONTEXT
  ucontext_t main_context;
#endif
  void *main_stack_pointer, *main_fake_stack = nullptr, *main_tsan = nullptr;
  const void* main_stack_bottom;
  size_t main_stack_bytes;
  char barrier_token, launch_token;  // what the thread sanitizer orders by
  size_t waits;                      // of a launch behind another
  std::vector<void*> blocks_shared;  // kept to the end of a launch: an address used twice would hide a race
} R;

Fiber* self() { return reinterpret_cast<Fiber*>(current); }

uint64_t next_random() {
  R.random ^= R.random << 13;
  R.random ^= R.random >> 7;
  R.random ^= R.random << 17;
  return R.random;
}

#if !SIMT_UCONTEXT
__attribute__((naked, noinline)) void switch_stack(void** /*save*/, void* /*load*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
}
#endif

void to_main([[maybe_unused]] bool dying) {
  Fiber* f = self();
#if SIMT_TSAN
  __tsan_release(&R.launch_token);  // launch() sees everything, also when this fiber is abandoned
  __tsan_switch_to_fiber(R.main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(dying ? nullptr : &f->fake_stack, R.main_stack_bottom, R.main_stack_bytes);
#endif
#if SIMT_UCONTEXT
  swapcontext(&f->context, &R.main_context);
#else
  switch_stack(&f->stack_pointer, R.main_stack_pointer);
#endif
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(f->fake_stack, &R.main_stack_bottom, &R.main_stack_bytes);
#endif
}

void to_fiber(Fiber* f) {
  current = &f->thread;
#if SIMT_TSAN
  __tsan_switch_to_fiber(f->tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&R.main_fake_stack, f->stack + kGuardBytes, kStackBytes);
#endif
#if SIMT_UCONTEXT
  swapcontext(&R.main_context, &f->context);
#else
  switch_stack(&R.main_stack_pointer, f->stack_pointer);
#endif
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(R.main_fake_stack, nullptr, nullptr);
#endif
}

void make_ready(Fiber* f) {
  f->state = State::kReady;
  R.ready[(R.head + R.count++) % kThreadsAtMost] = f->thread.linear;
}

int next_ready() {
  if (R.schedule == Schedule::kReverse) return R.ready[(R.head + --R.count) % kThreadsAtMost];
  if (R.schedule == Schedule::kRandom) {  // the best of four: some warps run far ahead, in every block others
    const auto rank = [](unsigned i) { return R.favours * (2 * (R.ready[i] / 32) + 1) >> 60; };
    unsigned best = R.head;
    for (int i = 0; i < 4; ++i) {
      const auto other = static_cast<unsigned>((R.head + next_random() % R.count) % kThreadsAtMost);
      if (i == 0 || rank(other) > rank(best)) best = other;
    }
    std::swap(R.ready[best], R.ready[R.head]);
  }
  const int thread = R.ready[R.head];
  R.head = (R.head + 1) % kThreadsAtMost;
  --R.count;
  return thread;
}

void release_barrier() {
  R.waiting = 0;
  for (int i = 0; i < R.threads; ++i) {
    if (R.pool[i]->state == State::kAtBarrier) make_ready(R.pool[i].get());
  }
}

// The last to arrive has no privilege where the schedule is permuted.
void yield_if_permuted(Fiber* f) {
  if (R.schedule == Schedule::kForward) return;
  make_ready(f);
  to_main(false);
}

void exit_thread() {
  Fiber* f = self();
  f->state = State::kDone;
  --R.live;
  Warp& warp = R.warps[f->thread.warp];
  warp.alive &= ~(1u << f->thread.lane);
  for (int i = 0; i < warp.count; ++i) {
    const Collective& what = warp.pending[i]->what;
    if (what.mask >> f->thread.lane & 1) {
      fail("thread %d exits while lanes wait for it at %s (%s:%d)", f->thread.linear, what.kind, what.file,
           what.line);
    }
  }
#if SIMT_TSAN
  __tsan_release(&R.launch_token);
#endif
  if (R.waiting && R.waiting == R.live) release_barrier();  // exited threads do not count, as since Volta
}

void enter_fiber() {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &R.main_stack_bottom, &R.main_stack_bytes);
#endif
#if SIMT_TSAN
  __tsan_acquire(&R.main_tsan);
#endif
  R.body(R.call);
  exit_thread();
  for (;;) to_main(true);
}

void prepare(Fiber* f) {
  constexpr int kProtection = PROT_READ | PROT_WRITE, kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (!f->stack) {
    f->stack = static_cast<char*>(mmap(nullptr, kStackBytes + kGuardBytes, kProtection, kFlags, -1, 0));
    if (f->stack == MAP_FAILED) fail("no memory for the stack of a fiber");
    mprotect(f->stack, kGuardBytes, PROT_NONE);
  }
#if SIMT_TSAN  // a fresh mapping: the sanitizer forgets the locals of the thread that used this stack before
  mmap(f->stack + kGuardBytes, kStackBytes, kProtection, kFlags | MAP_FIXED, -1, 0);
#endif
#if SIMT_UCONTEXT
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack + kGuardBytes;
  f->context.uc_stack.ss_size = kStackBytes;
  f->context.uc_link = nullptr;
  makecontext(&f->context, enter_fiber, 0);
#else
  const size_t colour = f->thread.linear % 61 * 64;  // spreads the hot frames over the cache sets
  void** top = reinterpret_cast<void**>(f->stack + kGuardBytes + kStackBytes - colour) - 1;  // rsp = 16 n + 8
  *top = nullptr;
  *--top = reinterpret_cast<void*>(enter_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f->stack_pointer = top;
#endif
#if SIMT_TSAN
  if (f->tsan) __tsan_destroy_fiber(f->tsan);
  f->tsan = __tsan_create_fiber(0);
#endif
}

// Of exact size, so that the address sanitizer has redzones on both sides.
void fresh_shared() {
  if (!SIMT_TSAN) free(R.shared);
  R.shared = nullptr;
  if (!R.shared_bytes) return;
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, R.shared_bytes)) fail("no memory for %zu shared bytes", R.shared_bytes);
  R.shared = static_cast<char*>(memory);
  volatile char* bytes = R.shared;  // volatile: no intercepted memset
  for (size_t i = 0; i < R.shared_bytes; ++i) bytes[i] = static_cast<char>(0xff);  // NaN in all dtypes
  if (SIMT_TSAN) R.blocks_shared.push_back(memory);
}

void report_deadlock() {
  size_t length = snprintf(R.error, sizeof R.error, "deadlock:");
  const Collective* last = nullptr;
  for (int i = 0, shown = 0; i < R.threads && shown < 5; ++i) {
    const Fiber* f = R.pool[i].get();
    const Collective& what = f->waits_for;
    if (f->state == State::kDone || (last && last->file == what.file && last->line == what.line)) continue;
    last = &what;
    ++shown;
    length +=
        snprintf(R.error + length, sizeof R.error - length, "\n  thread %d waits at %s mask %08x, %s:%d", i,
                 what.kind, what.mask, what.file, what.line);
  }
}

void run_block(uint3 block, dim3 block_dim, dim3 grid_dim) {
  R.live = R.threads;
  R.waiting = 0;
  R.head = R.count = 0;
  R.favours = next_random();
  fresh_shared();
  forget_copies();
  for (Warp& warp : R.warps) {
    warp.alive = 0;
    warp.count = 0;
    for (int i = 0; i < 32; ++i) warp.pending[i] = &warp.storage[i];
  }
  for (int i = 0; i < R.threads; ++i) {
    Fiber* f = R.pool[i].get();
    const unsigned x = i % block_dim.x, y = i / block_dim.x % block_dim.y,
                   z = i / (block_dim.x * block_dim.y);
    f->thread = {uint3{x, y, z}, block, block_dim, grid_dim, i, i % 32, i / 32};
    R.warps[i / 32].alive |= 1u << (i % 32);
    prepare(f);
    make_ready(f);
  }
  while (R.live && !R.error[0]) {
    if (!R.count) return report_deadlock();
    to_fiber(R.pool[next_ready()].get());
  }
}

void read_schedule() {
  const char* variable = getenv("SIMT_SCHEDULE");
  const std::string text = variable ? variable : "forward";
  R.random = 1;
  R.schedule = Schedule::kForward;
  if (text == "reverse") {
    R.schedule = Schedule::kReverse;
  } else if (text.rfind("random", 0) == 0) {
    R.schedule = Schedule::kRandom;
    R.random = 0x9E3779B97F4A7C15ull * (strtoull(text.c_str() + 6, nullptr, 10) + 1);
  } else if (text != "forward") {
    fail("SIMT_SCHEDULE must be forward, reverse or random<seed>, got %s", text.c_str());
  }
}

}  // namespace

// Inside a kernel the fiber is abandoned and launch() throws.
[[noreturn]] void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  const int wanted = vsnprintf(text, 800, format, arguments);
  va_end(arguments);
  if (!current) throw std::runtime_error(text);
  const size_t length = wanted < 800 ? wanted : 799;
  const uint3 b = current->block;
  snprintf(text + length, sizeof text - length, " [block (%u, %u, %u) thread %d]", b.x, b.y, b.z,
           current->linear);
  volatile char* error = R.error;
  for (size_t i = 0; i < sizeof text; ++i) error[i] = text[i];
  for (;;) to_main(false);
}

void sync_block(const char* file, int line) {
  Fiber* f = self();
  f->waits_for = {"__syncthreads", 0, true, file, line};
  for (int i = 0; R.waiting && i < R.threads; ++i) {
    const Collective& other = R.pool[i]->waits_for;
    if (R.pool[i]->state != State::kAtBarrier) continue;
    if (other.line != line || strcmp(other.file, file)) {
      fail("divergent barrier: here %s:%d, thread %d at %s:%d", file, line, i, other.file, other.line);
    }
    break;
  }
  ++R.waiting;
#if SIMT_TSAN
  __tsan_release(&R.barrier_token);
#endif
  if (R.waiting == R.live) {
    release_barrier();
    yield_if_permuted(f);
  } else {
    f->state = State::kAtBarrier;
    to_main(false);
  }
#if SIMT_TSAN
  __tsan_acquire(&R.barrier_token);
#endif
}

void run_collective(const Collective& what, void* arguments, void (*compute)(void**, unsigned)) {
  Fiber* f = self();
  f->waits_for = what;
  Warp& warp = R.warps[f->thread.warp];
  const int lane = f->thread.lane;
  if (!(what.mask >> lane & 1)) {
    fail("%s (%s:%d): calling lane %d is not in mask %08x", what.kind, what.file, what.line, lane, what.mask);
  }
  if (const unsigned missing = what.mask & ~warp.alive) {
    fail("%s (%s:%d): mask %08x names lanes that have exited or do not exist (%08x)", what.kind, what.file,
         what.line, what.mask, missing);
  }
  int index = 0;
  while (index < warp.count && !(warp.pending[index]->what.mask & what.mask)) ++index;
  if (index == warp.count) *warp.pending[warp.count++] = {what, 0, {}};
  Pending* pending = warp.pending[index];
  const Collective& other = pending->what;
  if (other.mask != what.mask || strcmp(other.kind, what.kind) || other.line != what.line ||
      strcmp(other.file, what.file)) {
    fail("diverged warp: lane %d at %s mask %08x %s:%d, others at %s mask %08x %s:%d", lane, what.kind,
         what.mask, what.file, what.line, other.kind, other.mask, other.file, other.line);
  }
  pending->arrived |= 1u << lane;
  pending->slot[lane] = arguments;
#if SIMT_TSAN
  if (what.orders_memory) __tsan_release(&warp.alive);
#endif
  if (pending->arrived == what.mask) {
    if (compute) compute(pending->slot, what.mask);
    for (int l = 0; l < 32; ++l) {
      if ((what.mask >> l & 1) && l != lane) make_ready(R.pool[f->thread.warp * 32 + l].get());
    }
    std::swap(warp.pending[index], warp.pending[--warp.count]);
    yield_if_permuted(f);
  } else {
    f->state = State::kAtCollective;
    to_main(false);
  }
#if SIMT_TSAN
  if (what.orders_memory) __tsan_acquire(&warp.alive);
#endif
}

void* dynamic_shared() {
  if (!R.shared_bytes) fail("the kernel uses shared memory, it was launched with 0 bytes");
  return R.shared;
}

void require_shared(const void* pointer, size_t bytes, const char* what) {
  const auto offset = static_cast<const char*>(pointer) - R.shared;
  if (offset < 0 || offset + bytes > R.shared_bytes) fail("%s: outside the shared memory", what);
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("%s: misaligned shared address", what);
}

void allow_shared(const void* kernel, size_t bytes) {
  const char* smaller_chip = getenv("SIMT_SHARED_BYTES");
  const size_t has = smaller_chip ? strtoul(smaller_chip, nullptr, 10) : kMaxSharedBytes;
  if (bytes > has) fail("%zu bytes of shared memory asked for, the chip has %zu", bytes, has);
  R.allowed[kernel] = bytes;
}

void begin_dependent() { R.waits = 0; }
void note_wait() { ++R.waits; }

void require_waits(const char* name, dim3 grid, dim3 block) {
  const size_t threads = size_t{grid.x} * grid.y * grid.z * block.x * block.y * block.z;
  if (R.waits != threads) fail("%s: %zu of %zu threads waited for the launch before", name, R.waits, threads);
}

void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            void (*body)(void*), void* call) {
  current = nullptr;
  R.error[0] = 0;
  R.name = name, R.body = body, R.call = call;
  R.threads = static_cast<int>(block.x * block.y * block.z);
  R.shared_bytes = shared_bytes;
  read_schedule();
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  if (R.threads < 1 || R.threads > kThreadsAtMost) fail("%s: %d threads per block", name, R.threads);
  if (!blocks || grid.y > 65535 || grid.z > 65535)
    fail("%s: bad grid (%u, %u, %u)", name, grid.x, grid.y, grid.z);
  const auto found = R.allowed.find(kernel);
  const size_t limit = found == R.allowed.end() ? kSharedBytes : std::max(kSharedBytes, found->second);
  if (shared_bytes > limit) fail("%s: %zu bytes of shared memory, %zu allowed", name, shared_bytes, limit);
  while (static_cast<int>(R.pool.size()) < R.threads) R.pool.push_back(std::make_unique<Fiber>());
#if SIMT_TSAN
  R.main_tsan = __tsan_get_current_fiber();
#endif
  const size_t first = R.random % blocks;
  for (size_t i = 0; i < blocks && !R.error[0]; ++i) {
#if SIMT_TSAN
    __tsan_release(&R.main_tsan);  // a block sees what preceded the launch, not the other blocks
#endif
    const size_t j = R.schedule == Schedule::kReverse  ? blocks - 1 - i
                     : R.schedule == Schedule::kRandom ? (i * 2654435761u + first) % blocks
                                                       : i;
    const auto x = static_cast<unsigned>(j % grid.x), y = static_cast<unsigned>(j / grid.x % grid.y);
    run_block(uint3{x, y, static_cast<unsigned>(j / (size_t{grid.x} * grid.y))}, block, grid);
  }
#if SIMT_TSAN
  __tsan_acquire(&R.launch_token);
  for (void* memory : R.blocks_shared) free(memory);
  R.blocks_shared.clear();
#endif
  current = nullptr;
  if (R.error[0]) throw std::runtime_error(std::string(name) + ": " + R.error);
}

}  // namespace simt
