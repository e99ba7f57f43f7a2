#pragma once

// Rows of logits of any dtype for tests, with conversions that are slow and plain.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "fastmrc/rows.h"

namespace fastmrc_test {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr fastmrc::DType kDTypes[] = {fastmrc::DType::kFloat32, fastmrc::DType::kFloat16,
                                      fastmrc::DType::kBFloat16};

inline const char* name_of(fastmrc::DType dtype) {
  if (dtype == fastmrc::DType::kFloat16) return "float16";
  return dtype == fastmrc::DType::kBFloat16 ? "bfloat16" : "float32";
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline bool same_bits(float a, float b) { return bits_of(a) == bits_of(b); }

inline bool same_bits(double a, double b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

// IEEE binary16 by its definition.
inline float from_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int fraction = bits & 1023;
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 31) {
    return fraction != 0 ? std::numeric_limits<float>::quiet_NaN()
                         : static_cast<float>(sign) * kInf;
  }
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return static_cast<float>(sign * magnitude);
}

// Rounds towards zero; beyond the range to the largest number.
inline uint16_t to_half(float x) {
  const int sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return static_cast<uint16_t>(sign | 0x7e00);
  if (std::isinf(x)) return static_cast<uint16_t>(sign | 0x7c00);
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude > 65504.0) return static_cast<uint16_t>(sign | 0x7bff);
  if (magnitude < std::ldexp(1.0, -14)) {
    return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(magnitude, 24)));
  }
  const int exponent = std::ilogb(magnitude);
  const int fraction = static_cast<int>((std::ldexp(magnitude, -exponent) - 1.0) * 1024.0);
  return static_cast<uint16_t>(sign | ((exponent + 15) << 10) | fraction);
}

// [rows, cols] with `stride`, the first row `shift` elements into the memory, whose end is the end
// of the last row: sanitizers see a read beyond it. What is between the rows is NaN.
class Matrix {
 public:
  Matrix(fastmrc::DType dtype, int64_t rows, int64_t cols, int64_t stride = 0, int64_t shift = 0)
      : dtype_(dtype),
        rows_(rows),
        cols_(cols),
        stride_(stride == 0 ? cols : stride),
        shift_(shift),
        bytes_(static_cast<size_t>((rows == 0 ? 0 : shift + (rows - 1) * stride_ + cols) *
                                   fastmrc::item_size(dtype)),
               0xff) {}

  fastmrc::Rows view() const {
    const fastmrc::Rows whole{bytes_.data(), dtype_, rows_, cols_, stride_};
    return {static_cast<const unsigned char*>(whole.data) + shift_ * fastmrc::item_size(dtype_),
            dtype_, rows_, cols_, stride_};
  }

  const void* row(int64_t r) const { return view().row(r); }
  const std::vector<unsigned char>& bytes() const { return bytes_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  fastmrc::DType dtype() const { return dtype_; }

  void set(int64_t r, int64_t c, float x) {
    if (dtype_ == fastmrc::DType::kFloat32) {
      store(r, c, x);
    } else if (dtype_ == fastmrc::DType::kFloat16) {
      store(r, c, to_half(x));
    } else {
      store(r, c, static_cast<uint16_t>(bits_of(x) >> 16 | (std::isnan(x) ? 1u : 0u)));
    }
  }

  void fill(float x) {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < cols_; ++c) set(r, c, x);
    }
  }

  float at(int64_t r, int64_t c) const {
    if (dtype_ == fastmrc::DType::kFloat32) return fetch<float>(r, c);
    const auto bits = fetch<uint16_t>(r, c);
    return dtype_ == fastmrc::DType::kFloat16 ? from_half(bits)
                                              : float_of(static_cast<uint32_t>(bits) << 16);
  }

 private:
  size_t byte(int64_t r, int64_t c) const {
    return static_cast<size_t>((shift_ + r * stride_ + c) * fastmrc::item_size(dtype_));
  }

  template <typename T>
  void store(int64_t r, int64_t c, T item) {
    std::memcpy(bytes_.data() + byte(r, c), &item, sizeof(item));
  }

  template <typename T>
  T fetch(int64_t r, int64_t c) const {
    T item;
    std::memcpy(&item, bytes_.data() + byte(r, c), sizeof(item));
    return item;
  }

  fastmrc::DType dtype_;
  int64_t rows_, cols_, stride_, shift_;
  std::vector<unsigned char> bytes_;
};

}  // namespace fastmrc_test
