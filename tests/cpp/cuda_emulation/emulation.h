// Runs CUDA kernels on the host, for tests where there is no GPU: the part of CUDA C++ that
// csrc/cuda uses, block by block. The threads of a block are coroutines that change at barriers and
// warp operations, in an order that a test may choose; an operation that not all of its threads
// reach ends the program. What it cannot show: the memory model, speed, and what nvcc makes of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

using std::max;
using std::min;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after the other, so one copy serves all.
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// Runs body once per thread of each block; one call at a time.
void run(dim3 grid, unsigned threads, const std::function<void()>& body);

// 0: threads in rising order; else that seed's order of blocks, warps and lanes.
void set_order(uint64_t seed);

// Waits for the block; returns for how many of its threads `predicate` was true.
int block_barrier(bool predicate);

// Gives `value` to the warp and waits for it; returns the values of all lanes.
const uint64_t* warp_exchange(unsigned mask, uint64_t value);

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a warp exchanges up to 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned lane() { return threadIdx.x % 32; }

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(false); }
inline int __syncthreads_count(int predicate) { return emulation::block_barrier(predicate != 0); }
inline int __syncthreads_or(int predicate) { return emulation::block_barrier(predicate != 0) > 0; }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::from_bits<T>(
      emulation::warp_exchange(mask, emulation::to_bits(value))[source % 32]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, static_cast<int>(emulation::lane()) ^ lanes);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = emulation::lane();
  return __shfl_sync(mask, value, static_cast<int>(lane < delta ? lane : lane - delta));
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = emulation::warp_exchange(mask, predicate != 0 ? 1 : 0);
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i) ballot |= static_cast<unsigned>(values[i]) << i;
  return ballot;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename T, typename U>
T atomicAdd(T* address, U value) {
  const T old = *address;
  *address = static_cast<T>(old + static_cast<T>(value));
  return old;
}

template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}

template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}

template <typename T>
T atomicExch(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}

template <typename T>
T atomicCAS(T* address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

inline unsigned __float_as_uint(float x) {
  return emulation::from_bits<unsigned>(emulation::to_bits(x));
}
inline float __uint_as_float(unsigned x) { return emulation::from_bits<float>(x); }
inline int __float_as_int(float x) { return emulation::from_bits<int>(emulation::to_bits(x)); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
