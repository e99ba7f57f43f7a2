// parallel_for: results, exceptions, nested and concurrent calls, any number of threads, fork().

#include "core/thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/wait.h>
#endif

#include "check.h"

// The thread sanitizer does not support threads after fork().
#if defined(__SANITIZE_THREAD__)
#define FASTMRC_TEST_FORK 0
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define FASTMRC_TEST_FORK 0
#endif
#endif
#if !defined(FASTMRC_TEST_FORK) && defined(__linux__)
#define FASTMRC_TEST_FORK 1
#endif

namespace {

using fastmrc::num_threads;
using fastmrc::parallel_for;
using fastmrc::parallel_for_work;
using fastmrc::set_num_threads;

constexpr int kMaxThreads = 8;

// Each task once: the sum over tasks of (i + 1)^2, written to separate places.
bool squares_are_right(int64_t count) {
  std::vector<int64_t> out(static_cast<size_t>(count), 0);
  parallel_for(count, [&](int64_t i) { out[static_cast<size_t>(i)] += (i + 1) * (i + 1); });
  for (int64_t i = 0; i < count; ++i) {
    if (out[static_cast<size_t>(i)] != (i + 1) * (i + 1)) return false;
  }
  return true;
}

void test_number_of_threads() {
  CHECK(num_threads() >= 1);
  for (int n = 1; n <= kMaxThreads; ++n) {
    set_num_threads(n);
    CHECK_EQ(num_threads(), n);
  }
  for (const int n : {0, -4}) {
    CHECK_THROWS(set_num_threads(n), std::invalid_argument,
                 "num_threads: expected at least 1, got " + std::to_string(n));
  }
  CHECK_EQ(num_threads(), kMaxThreads);
}

void test_every_task_runs_once() {
  for (int round = 0; round < 3; ++round) {
    for (int n = 1; n <= kMaxThreads; ++n) {
      set_num_threads(round == 1 ? kMaxThreads + 1 - n : n);
      for (const int64_t count : {-1, 0, 1, 2, 3, 7, 64, 5000}) {
        CHECK(squares_are_right(std::max<int64_t>(count, 0)));
        if (count < 0) parallel_for(count, [](int64_t) { CHECK(false); });
      }
    }
  }
}

// No more than num_threads() tasks at once, also after the pool has had more workers.
void test_limit() {
  for (int n = kMaxThreads; n >= 1; --n) {
    set_num_threads(n);
    std::atomic<int> running{0}, most{0};
    parallel_for(40, [&](int64_t) {
      const int now = ++running;
      int seen = most.load();
      while (now > seen && !most.compare_exchange_weak(seen, now)) {
      }
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      --running;
    });
    CHECK(most.load() <= n);
  }
}

// Tasks that wait for each other end only if there are as many threads.
void test_tasks_run_at_once() {
  set_num_threads(4);
  std::atomic<int> arrived{0};
  std::atomic<bool> late{false};
  parallel_for(4, [&](int64_t) {
    ++arrived;
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (arrived.load() < 4 && !late.load()) {
      if (std::chrono::steady_clock::now() > give_up) late = true;
      std::this_thread::yield();
    }
  });
  CHECK(!late.load());
}

void test_lowest_exception_wins() {
  for (int n = 1; n <= kMaxThreads; ++n) {
    set_num_threads(n);
    for (int64_t lowest = 0; lowest < 40; ++lowest) {
      const auto task = [&](int64_t i) {
        // The lowest one comes late, so that others are there before it.
        if (i == lowest) std::this_thread::sleep_for(std::chrono::microseconds(50));
        if (i >= lowest && (i - lowest) % 3 == 0)
          throw std::runtime_error("task " + std::to_string(i));
      };
      std::string message = "none";
      try {
        parallel_for(40, task);
      } catch (const std::runtime_error& error) {
        message = error.what();
      }
      CHECK_EQ(message, "task " + std::to_string(lowest));
    }
    CHECK(squares_are_right(100));
  }
}

void test_nested_calls() {
  for (const int n : {1, 2, 5}) {
    set_num_threads(n);
    std::vector<int64_t> sums(30, 0);
    parallel_for(30, [&](int64_t i) {
      const std::thread::id outer = std::this_thread::get_id();
      parallel_for(20, [&](int64_t j) {
        parallel_for(2, [&](int64_t) { sums[static_cast<size_t>(i)] += j; });
        if (outer != std::this_thread::get_id()) sums[static_cast<size_t>(i)] = -1000;
      });
    });
    CHECK_EQ(sums, std::vector<int64_t>(30, 380));
    CHECK_THROWS(
        parallel_for(10,
                     [](int64_t i) {
                       parallel_for(10, [i](int64_t j) {
                         if (i >= 4 && j >= 6) {
                           throw std::runtime_error(std::to_string(i) + "/" + std::to_string(j));
                         }
                       });
                     }),
        std::runtime_error, "4/6");
    CHECK(squares_are_right(100));
  }
}

void test_small_work_stays_on_the_callers_thread() {
  set_num_threads(kMaxThreads);
  const std::thread::id caller = std::this_thread::get_id();
  int64_t elsewhere = 0, runs = 0;
  parallel_for_work(fastmrc::kMinParallelWork - 1, 100, [&](int64_t) {
    ++runs;
    elsewhere += std::this_thread::get_id() != caller;
  });
  CHECK_EQ(runs, int64_t{100});
  CHECK_EQ(elsewhere, int64_t{0});
  std::vector<int> out(100, 0);
  parallel_for_work(fastmrc::kMinParallelWork, 100,
                    [&](int64_t i) { ++out[static_cast<size_t>(i)]; });
  CHECK_EQ(out, std::vector<int>(100, 1));
}

void test_concurrent_callers() {
  set_num_threads(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 5; ++c) {
    callers.emplace_back([&, c] {
      for (int i = 0; i < 300; ++i) {
        if (!squares_are_right(1 + (i * 7 + c) % 50)) ++wrong;
        if (c == 0) set_num_threads(1 + i % kMaxThreads);
        try {
          parallel_for(8, [c](int64_t j) {
            if (j >= c) throw std::runtime_error(std::to_string(j));
          });
          ++wrong;
        } catch (const std::runtime_error& error) {
          if (error.what() != std::to_string(c)) ++wrong;
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK_EQ(wrong.load(), 0);
}

#if FASTMRC_TEST_FORK

// What the child does, and its exit code. Without exit handlers: they belong to the parent.
void run_child() {
  alarm(30);  // a deadlock ends the child with a signal
  bool right = true;
  for (int i = 0; i < 20; ++i) right &= squares_are_right(200);
  set_num_threads(3);
  bool caught = false;
  try {
    parallel_for(10, [](int64_t i) {
      if (i >= 5) throw std::runtime_error(std::to_string(i));
    });
  } catch (const std::runtime_error& error) {
    caught = std::string(error.what()) == "5";
  }
  _exit(right && caught ? 0 : 1);
}

bool child_succeeds() {
  const pid_t child = fork();
  if (child == 0) run_child();
  int status = -1;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) &&
         WEXITSTATUS(status) == 0;
}

void test_fork() {
  set_num_threads(4);
  CHECK(squares_are_right(1000));  // the parent has workers
  CHECK(child_succeeds());
  CHECK(squares_are_right(1000));
}

void test_fork_while_another_thread_uses_the_pool() {
  set_num_threads(4);
  std::atomic<bool> stop{false};
  std::vector<int64_t> out(64);
  const std::function<void(int64_t)> task = [&](int64_t i) { out[static_cast<size_t>(i)] = i; };
  std::thread caller([&] {
    while (!stop.load()) parallel_for(64, task);
  });
  for (int i = 0; i < 20; ++i) CHECK(child_succeeds());
  stop = true;
  caller.join();
}

// The child of a task goes on inside that task.
void test_fork_in_a_task() {
  set_num_threads(2);
  std::vector<uint8_t> succeeded(2, 0);
  parallel_for(2, [&](int64_t i) { succeeded[static_cast<size_t>(i)] = child_succeeds(); });
  CHECK_EQ(succeeded, std::vector<uint8_t>(2, 1));
  CHECK(squares_are_right(1000));
}

#endif

}  // namespace

int main() {
  test_number_of_threads();
  test_every_task_runs_once();
  test_limit();
  test_tasks_run_at_once();
  test_lowest_exception_wins();
  test_nested_calls();
  test_small_work_stays_on_the_callers_thread();
  test_concurrent_callers();
#if FASTMRC_TEST_FORK
  test_fork();
  test_fork_while_another_thread_uses_the_pool();
  test_fork_in_a_task();
#else
  std::cout << "fork: not tested here" << std::endl;
#endif
  return fastmrc_test::report();
}
