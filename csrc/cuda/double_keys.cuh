// Rankings by sums in double precision, where 64 bits do not hold a number and what it belongs to.
#pragma once

#include <cstring>
#include <limits>

#include "cuda/block.cuh"
#include "cuda/row_pass.h"

namespace fastmrc::cuda {

__device__ constexpr float kQuietNan = std::numeric_limits<float>::quiet_NaN();

// Larger numbers have larger bits, and those of every number are above 0. Not for NaN.
__device__ inline uint64_t ordered_bits_of_double(double value) {
  value += 0.0;  // -0 and +0 are equal values
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  constexpr uint64_t kSign = uint64_t{1} << 63;
  return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

__device__ inline double double_from_ordered_bits(uint64_t ordered) {
  constexpr uint64_t kSign = uint64_t{1} << 63;
  const uint64_t bits = (ordered & kSign) != 0 ? ordered & ~kSign : ~ordered;
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// A key for Collector: larger for larger numbers and, of equal ones, for larger `rest`. DoubleKey{}
// is below those of all numbers. Trivial, as shared memory requires.
struct alignas(16) DoubleKey {
  uint64_t ordered;
  uint64_t rest;

  __device__ bool operator>(const DoubleKey& other) const {
    return ordered != other.ordered ? ordered > other.ordered : rest > other.rest;
  }
};

// `value` rounded down, or the float below that.
__device__ inline float float_below(double value) {
  const float nearest = static_cast<float>(value);
  if (!(static_cast<double>(nearest) > value)) return nearest;
  return from_ordered_bits(ordered_bits(nearest) - 2);  // 1 below the bits of zero is -0
}

// A number that at least k of values[0 .. n) reach: the k-th largest but for its last bits, by
// which it may be too small; -inf if there are fewer than k. All threads must call; no NaN.
template <typename T>
__device__ float bar_of(const T* values, int n, int k) {
  constexpr int kBits = 23;  // sign, exponent and 14 bits of the fraction
  if (k > n) return -kInfinity;
  const int threads = static_cast<int>(blockDim.x);
  uint32_t found = 0;
  for (int bit = 31; bit > 31 - kBits; --bit) {
    const uint32_t candidate = found | (1u << bit);
    int reached = 0;
    for (int begin = 0; begin < n; begin += threads) {
      const int i = begin + static_cast<int>(threadIdx.x);
      const float value = i < n ? float_below(static_cast<double>(values[i])) : -kInfinity;
      reached += __syncthreads_count(i < n && ordered_bits(value) >= candidate);
    }
    if (reached >= k) found = candidate;
  }
  return from_ordered_bits(max(found, ordered_bits(-kInfinity)));  // below it are NaN
}

}  // namespace fastmrc::cuda
