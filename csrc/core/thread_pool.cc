#include "core/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

namespace fastmrc {
namespace {

int available_processors() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n == 0 ? 1 : static_cast<int>(n);
}

std::atomic<int>& thread_limit() {
  static std::atomic<int> limit{available_processors()};
  return limit;
}

thread_local bool inside_task = false;

// Waits some microseconds for `ready` before the caller goes to sleep: the next job of a beam step
// or the next call from Python follows soon, and waking a sleeping thread takes as long as half
// such a job. Short enough that torch's threads do not miss the core.
template <typename Ready>
void spin_until(Ready ready) {
  constexpr int kSpins = 1200;  // some 20 to 70 us
  for (int i = 0; i < kSpins && !ready(); ++i) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }
}

// How often a thread claims tasks of a job. Often enough that all end together; where tasks are
// many it takes neighbours, as what a task fetches ahead of its row begins the next one.
constexpr int64_t kClaims = 16;

// One call of parallel_for; lives on the caller's stack.
struct Job {
  const std::function<void(int64_t)>* task = nullptr;
  int64_t count = 0;
  int64_t claim = 1;  // tasks that a thread takes at a time
  std::atomic<int64_t> next{0};
  std::mutex error_mutex;
  int64_t error_index = 0;
  std::exception_ptr error;

  // Claims and runs tasks until none is left.
  void work() {
    inside_task = true;
    for (int64_t first = next.fetch_add(claim); first < count; first = next.fetch_add(claim)) {
      for (int64_t i = first; i < std::min(count, first + claim); ++i) run(i);
    }
    inside_task = false;
  }

  void run(int64_t i) {
    try {
      (*task)(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error || i < error_index) {
        error = std::current_exception();
        error_index = i;
      }
    }
  }
};

class Pool {
 public:
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  // False if another thread is using the pool.
  bool run(Job& job, int threads) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        workers_.emplace_back([this] { serve(); });
      }
      job_ = &job;
      seats_ = threads - 1;
      jobs_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.work();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;  // from here on no worker can join
    }
    spin_until([this] { return active_.load(std::memory_order_acquire) == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_.load(std::memory_order_acquire) == 0; });
    return true;
  }

 private:
  void serve() {
    uint64_t seen = 0;
    for (;;) {
      spin_until([&] { return jobs_.load(std::memory_order_acquire) != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stopping_ || (job_ != nullptr && seats_ > 0); });
      if (stopping_) return;
      Job* job = job_;
      seen = jobs_.load(std::memory_order_acquire);
      --seats_;
      active_.fetch_add(1, std::memory_order_acq_rel);
      lock.unlock();
      job->work();
      lock.lock();
      if (active_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.notify_one();
    }
  }

  std::mutex busy_;  // held by the caller whose job is running
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int seats_ = 0;  // workers that may still join the job
  std::atomic<int> active_{0};
  std::atomic<uint64_t> jobs_{0};  // counts jobs, so that spinning workers see a new one
  bool stopping_ = false;
};

// The pool is deliberately never destroyed: at exit its sleeping workers are ended by the system,
// and after fork() the child must not touch threads and locks it does not own.
Pool*& pool_pointer() {
  static Pool* pool = nullptr;
  return pool;
}

Pool& pool() {
  static std::mutex mutex;
  static std::once_flag fork_handler;
  std::call_once(fork_handler, [] {
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); },
                   [] {
                     pool_pointer() = nullptr;
                     mutex.unlock();
                   });
  });
  const std::lock_guard<std::mutex> lock(mutex);
  if (pool_pointer() == nullptr) pool_pointer() = new Pool;
  return *pool_pointer();
}

}  // namespace

int num_threads() { return thread_limit().load(); }

void set_num_threads(int n) {
  if (n < 1) {
    throw std::invalid_argument("num_threads: expected at least 1, got " + std::to_string(n));
  }
  thread_limit().store(n);
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& task) {
  if (count <= 0) return;
  const int64_t limit = num_threads();
  const int threads = static_cast<int>(limit < count ? limit : count);
  if (threads > 1 && !inside_task) {
    Job job;
    job.task = &task;
    job.count = count;
    job.claim = std::max<int64_t>(1, count / (kClaims * threads));
    if (pool().run(job, threads)) {
      if (job.error) std::rethrow_exception(job.error);
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) task(i);
}

void parallel_for_work(int64_t work, int64_t count, const std::function<void(int64_t)>& task) {
  if (work >= kMinParallelWork) {
    parallel_for(count, task);
    return;
  }
  for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace fastmrc
