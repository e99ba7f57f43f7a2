// A persistent pool of worker threads with one entry: parallel_for.
#pragma once

#include <cstdint>
#include <functional>

namespace fastmrc {

// Upper bound of the threads that parallel_for uses, the caller's included; at least 1.
// Default: the processors this process may run on.
int num_threads();
void set_num_threads(int n);

// Runs task(i) for i in [0, count) on the caller's thread and the pool's workers, and returns when
// all are done. Tasks must write to separate places; who runs which task is not fixed, so results
// never depend on the number of threads. If tasks throw, the exception of the lowest i that threw
// is thrown again here. Called while another thread uses the pool, or in a task, it runs the tasks
// on the caller's thread.
//
// Workers sleep between jobs after spinning for some microseconds only, because torch's OpenMP
// runtime needs the same cores; the caller takes over every task that no worker has begun, so a
// worker that wakes late costs nothing. After fork() the child starts a pool of its own.
void parallel_for(int64_t count, const std::function<void(int64_t)>& task);

// `work` estimates the elements touched, as exponentials in a row pass: below a size where waking a
// thread costs more than it brings (measured: a wake-up takes about 10 us, less while the workers
// still spin, a pass over 32,768 floats about 6 us) the tasks run on the caller's thread.
constexpr int64_t kMinParallelWork = 1 << 15;
void parallel_for_work(int64_t work, int64_t count, const std::function<void(int64_t)>& task);

}  // namespace fastmrc
