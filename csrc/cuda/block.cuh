// What the threads of a block do together. All must call, the same thing in the same order; the
// results do not depend on which of them comes first.
#pragma once

#include "cuda/numbers.cuh"

namespace fastmrc::cuda {

constexpr int kMaxWarps = 32;

struct Maximum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct MaximumOrNan {
  __device__ float operator()(float a, float b) const { return max_or_nan(a, b); }
};
struct Minimum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Combines one value per thread; every thread gets the result. The order is fixed.
template <typename T, typename Op>
__device__ T block_reduce(T value, Op op) {
  __shared__ T of_warp[kMaxWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    value = op(value, __shfl_xor_sync(kFullWarp, value, lanes));
  }
  __syncthreads();  // the values of the last call are read
  if (threadIdx.x % kWarpSize == 0) of_warp[warp] = value;
  __syncthreads();
  T result = of_warp[0];
  for (int w = 1; w < warps; ++w) result = op(result, of_warp[w]);
  return result;
}

// Sum of the values of this thread and those before it.
template <typename T>
__device__ T block_inclusive_scan(T value) {
  __shared__ T of_warp[kMaxWarps];
  const unsigned lane = threadIdx.x % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (unsigned delta = 1; delta < kWarpSize; delta *= 2) {
    const T before = __shfl_up_sync(kFullWarp, value, delta);
    if (lane >= delta) value = before + value;
  }
  __syncthreads();  // the values of the last call are read
  if (lane == kWarpSize - 1) of_warp[warp] = value;
  __syncthreads();
  T before = T{};
  for (int w = 0; w < warp; ++w) before = before + of_warp[w];
  return before + value;
}

// The k-th largest of one number per thread, but for its last bits, by which it may be too small;
// k at most the number of threads.
__device__ inline float block_kth_largest(float value, int k) {
  constexpr int kBits = 20;
  const uint32_t own = ordered_bits(value);
  uint32_t found = 0;
  for (int bit = 31; bit > 31 - kBits; --bit) {
    const uint32_t candidate = found | (1u << bit);
    if (__syncthreads_count(own >= candidate) >= k) found = candidate;
  }
  return from_ordered_bits(max(found, ordered_bits(-kInfinity)));  // below it are NaN
}

// Keys collected by the threads of a block, of which the largest `k` are wanted.
//
// While there is room, `offer` takes what a thread has; the threads then see together whether all
// found room (`overflowed`). Where they may not, `offer_all` takes one key from each thread at a
// time and keeps what can still be among the largest: slower, for any number of keys.
template <typename Key, int kRoom>
class Collector {
 public:
  // `keys` in shared memory; count and bar too, by one thread each.
  __device__ explicit Collector(int k) : k_(k) {
    if (threadIdx.x == 0) shared().count = 0;
    bar_ = Key{};
    __syncthreads();
  }

  // Takes a key; a full collector only counts it.
  __device__ void offer(const Key& key) {
    const int place = atomicAdd(&shared().count, 1);
    if (place < kRoom) shared().keys[place] = key;
  }

  // Whether keys were lost; then it is empty again.
  __device__ bool overflowed() {
    __syncthreads();
    const bool lost = shared().count > kRoom;
    __syncthreads();
    if (lost && threadIdx.x == 0) shared().count = 0;
    __syncthreads();
    return lost;
  }

  // Takes a key from each thread that has one.
  __device__ void offer_all(bool has_key, const Key& key) {
    if (has_key && key > bar_) offer(key);
    __syncthreads();
    const int count = shared().count;
    __syncthreads();
    if (count + static_cast<int>(blockDim.x) > kRoom) keep_largest();
  }

  // Sorts the largest k to the front; returns how many there are. Then key(0) > key(1) > ...
  __device__ int finish() {
    __syncthreads();
    keep_largest();
    return shared().count;
  }

  __device__ const Key& key(int i) const { return shared().keys[i]; }

 private:
  struct Shared {
    Key keys[kRoom];
    int count;
  };

  __device__ static Shared& shared() {
    __shared__ Shared memory;
    return memory;
  }

  // The place of a key is the number of larger ones: no two are equal.
  __device__ void keep_largest() {
    constexpr int kLeastThreads = 128;
    constexpr int kOwn = kRoom / kLeastThreads;
    Key own[kOwn];
    int place[kOwn];
    const int count = shared().count;
    const int threads = static_cast<int>(blockDim.x);
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int i = static_cast<int>(threadIdx.x) + n * threads;
      place[n] = k_;
      if (i >= count) continue;
      own[n] = shared().keys[i];
      place[n] = 0;
      for (int j = 0; j < count; ++j) place[n] += shared().keys[j] > own[n] ? 1 : 0;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      if (place[n] < k_) shared().keys[place[n]] = own[n];
    }
    if (threadIdx.x == 0) shared().count = min(count, k_);
    __syncthreads();
    if (shared().count == k_) bar_ = shared().keys[k_ - 1];
    __syncthreads();
  }

  int k_;
  Key bar_;  // the k-th largest key so far, if there are k
};

// True in the block that comes last of `blocks` that call with the same counter, which is zero
// before and after; what the others wrote before is seen by it.
__device__ inline bool is_last_block(int32_t* counter, int32_t blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == blocks - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

}  // namespace fastmrc::cuda
