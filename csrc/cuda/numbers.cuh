// Numbers as the kernels read and compare them.
#pragma once

#include <cstdint>
#include <limits>

#include "cuda/fault.h"
#include "cuda/platform.h"
#include "fastmrc/rows.h"

namespace fastmrc::cuda {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ constexpr float kInfinity = std::numeric_limits<float>::infinity();
__device__ constexpr double kInfinityDouble = std::numeric_limits<double>::infinity();

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ inline float to_float(Float16 x) {
#if defined(FASTMRC_CUDA_EMULATION)
  const unsigned sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude < 0x0400u) {
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    return sign != 0 ? -subnormal : subnormal;
  }
  const unsigned rebias = (magnitude >= 0x7c00u ? 2u : 1u) * ((127u - 15u) << 23);
  return __uint_as_float(sign | ((magnitude << 13) + rebias));
#else
  return __half2float(__ushort_as_half(x.bits));
#endif
}

// Larger of two numbers; NaN if one is.
__device__ inline float max_or_nan(float a, float b) {
#if defined(FASTMRC_CUDA_EMULATION)
  return a != a || b != b ? std::numeric_limits<float>::quiet_NaN() : (a > b ? a : b);
#else
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#endif
}

// 2^x to 2 units in the last place; 0 for -inf.
__device__ inline float fast_exp2(float x) {
#if defined(FASTMRC_CUDA_EMULATION)
  return std::exp2(x);
#else
  float result;
  asm("ex2.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// exp(x) to 2e-6 relative for x from -40 to 0, to 8e-6 down to the least normal number.
__device__ inline float fast_exp(float x) { return fast_exp2(x * 1.442695040888963f); }

// Larger for larger values and, of equal ones, for smaller ids. Neither NaN nor negative ids; above
// kNoKey.
constexpr uint64_t kNoKey = 0;

__device__ inline uint32_t ordered_bits(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 and +0 are equal values
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ inline float from_ordered_bits(uint32_t ordered) {
  return __uint_as_float((ordered & 0x80000000u) != 0 ? ordered & 0x7fffffffu : ~ordered);
}

__device__ inline uint64_t sort_key(float value, int32_t id) {
  return (static_cast<uint64_t>(ordered_bits(value)) << 32) | static_cast<uint32_t>(~id);
}

__device__ inline int32_t id_of(uint64_t key) {
  return static_cast<int32_t>(~static_cast<uint32_t>(key));
}

__device__ inline float value_of(uint64_t key) {
  return from_ordered_bits(static_cast<uint32_t>(key >> 32));
}

// Rows with their dtype as a type.
template <typename T>
struct TypedRows {
  using Item = T;

  const T* data;
  int64_t rows, cols, stride;

  __device__ const T* row(int64_t i) const { return data + i * stride; }
};

// Calls fn with the rows typed.
template <typename Fn>
void with_type(const Rows& rows, Fn fn) {
  switch (rows.dtype) {
    case DType::kFloat32:
      return fn(TypedRows<float>{static_cast<const float*>(rows.data), rows.rows, rows.cols,
                                 rows.stride});
    case DType::kFloat16:
      return fn(TypedRows<Float16>{static_cast<const Float16*>(rows.data), rows.rows, rows.cols,
                                   rows.stride});
    case DType::kBFloat16:
      return fn(TypedRows<BFloat16>{static_cast<const BFloat16*>(rows.data), rows.rows, rows.cols,
                                    rows.stride});
  }
}

// Notes a fault of the input, see fault.h.
__device__ inline void report(int64_t* fault, int64_t row, Fault kind) {
  const int64_t code = row << 8 | static_cast<int64_t>(kind);
#if defined(FASTMRC_CUDA_EMULATION)
  atomicMin(fault, code);
#else
  atomicMin(reinterpret_cast<long long*>(fault), static_cast<long long>(code));
#endif
}

}  // namespace fastmrc::cuda
