#include "emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// A caller must not be compiled by what such a function is seen to leave alone, as other code runs
// before it returns.
#if defined(__clang__)
#define FASTMRC_OPAQUE __attribute__((noinline, no_sanitize("address")))
#else
#define FASTMRC_OPAQUE __attribute__((noipa, no_sanitize_address))
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;

enum class State { kReady, kAtWarp, kAtBlock, kDone };

// A thread of the block that runs; its coroutine serves one block after the other.
struct Thread {
  ucontext_t context;
  void* resume[5];  // of __builtin_setjmp, which takes no system call, unlike swapcontext
  void* stack = nullptr;
  bool started = false;
  State state = State::kDone;
  unsigned exchanges = 0;  // warp operations so far
};

std::vector<Thread> threads;
std::vector<uint64_t> exchanged;  // [warps, 2, 32]; two, as one is read while the next is written
void* scheduler[5];
const std::function<void()>* body = nullptr;
unsigned current = 0;
int counted = 0, count = 0;  // of the barrier that is filling, and of the last one
uint64_t order_seed = 0;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated block %u, thread %u: %s\n", blockIdx.x, current, what);
  std::abort();
}

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
void before_thread(const Thread& t) {
  __sanitizer_start_switch_fiber(nullptr, t.stack, kStackBytes);
}
void in_thread() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
}
void before_scheduler() {
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_size);
}
void in_scheduler() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
#else
void before_thread(const Thread&) {}
void in_thread() {}
void before_scheduler() {}
void in_scheduler() {}
#endif

// A function of its own: GCC takes a jump beside a __builtin_setjmp for one to it.
[[noreturn]] FASTMRC_OPAQUE void jump(void** buffer) { __builtin_longjmp(buffer, 1); }

// Gives control back until the scheduler resumes this thread.
FASTMRC_OPAQUE void wait(State state) {
  Thread& own = threads[current];
  own.state = state;
  before_scheduler();
  if (__builtin_setjmp(own.resume) == 0) jump(scheduler);
  in_thread();
}

void serve() {
  in_thread();
  for (;;) {
    (*body)();
    wait(State::kDone);
  }
}

FASTMRC_OPAQUE void switch_to(Thread& thread) {
  before_thread(thread);
  if (__builtin_setjmp(scheduler) == 0) {
    if (thread.started) jump(thread.resume);
    thread.started = true;
    setcontext(&thread.context);
  }
  in_scheduler();
}

void resume(unsigned i) {
  current = i;
  threadIdx = dim3(i);
  switch_to(threads[i]);
}

void make_threads(unsigned number) {
  // A running coroutine must not move: room for the largest block at once.
  constexpr unsigned kMostThreads = 1024;
  if (threads.empty()) {
    threads.resize(kMostThreads);
    exchanged.resize(kMostThreads * 2);
  }
  if (number == 0 || number > kMostThreads || number % kWarp != 0) {
    fail("expected a block of whole warps, at most 1,024 threads");
  }
  for (unsigned i = 0; i < number; ++i) {
    Thread& t = threads[i];
    if (t.stack != nullptr) continue;
    t.stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (t.stack == MAP_FAILED) fail("no memory for a stack");
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStackBytes;
    t.context.uc_link = nullptr;
    makecontext(&t.context, serve, 0);
  }
}

std::vector<unsigned> ordered(unsigned number, uint64_t salt) {
  std::vector<unsigned> order(number);
  std::iota(order.begin(), order.end(), 0u);
  if (order_seed != 0) {
    std::mt19937_64 generator(order_seed * 1000003 + salt);
    std::shuffle(order.begin(), order.end(), generator);
  }
  return order;
}

bool all_lanes(unsigned warp, State state) {
  for (unsigned i = warp * kWarp; i < (warp + 1) * kWarp; ++i) {
    if (threads[i].state != state) return false;
  }
  return true;
}

void run_block(unsigned number, const std::vector<unsigned>& warps,
               const std::vector<unsigned>& lanes) {
  for (unsigned i = 0; i < number; ++i) {
    threads[i].state = State::kReady;
    threads[i].exchanges = 0;
  }
  counted = 0;
  for (;;) {
    bool progress = false;
    for (const unsigned warp : warps) {
      for (const unsigned lane : lanes) {
        if (threads[warp * kWarp + lane].state != State::kReady) continue;
        resume(warp * kWarp + lane);
        progress = true;
      }
      if (all_lanes(warp, State::kAtWarp)) {
        for (unsigned i = 0; i < kWarp; ++i) threads[warp * kWarp + i].state = State::kReady;
        progress = true;
      }
    }
    if (progress) continue;
    bool done = true;
    for (unsigned i = 0; i < number; ++i) {
      if (threads[i].state == State::kDone) continue;
      done = false;
      current = i;
      if (threads[i].state == State::kAtWarp) fail("waits for its warp in vain");
    }
    if (done) return;
    // CUDA leaves a barrier that some threads never reach undefined unless they have returned; the
    // kernels here do not rely on that.
    for (unsigned i = 0; i < number; ++i) {
      current = i;
      if (threads[i].state != State::kAtBlock) fail("returned while others wait at a barrier");
      threads[i].state = State::kReady;
    }
    count = counted;
    counted = 0;
  }
}

}  // namespace

void set_order(uint64_t seed) { order_seed = seed; }

int block_barrier(bool predicate) {
  counted += predicate ? 1 : 0;
  wait(State::kAtBlock);
  return count;
}

const uint64_t* warp_exchange(unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu) fail("expected a whole warp");
  Thread& own = threads[current];
  uint64_t* slots = exchanged.data() + (current / kWarp * 2 + own.exchanges++ % 2) * kWarp;
  slots[current % kWarp] = value;
  wait(State::kAtWarp);
  return slots;
}

void run(dim3 grid, unsigned number, const std::function<void()>& function) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  make_threads(number);
  body = &function;
  gridDim = grid;
  blockDim = dim3(number);
  const std::vector<unsigned> warps = ordered(number / kWarp, 1), lanes = ordered(kWarp, 2);
  for (const unsigned block : ordered(grid.x, 3)) {
    blockIdx = dim3(block);
    run_block(number, warps, lanes);
  }
}

}  // namespace emulation
