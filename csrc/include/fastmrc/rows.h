// A batch of equally long rows of logits, as the kernels see it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmrc {

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16 };

inline int64_t item_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// [rows, cols], unit stride along a row; never owns its memory.
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // elements from one row to the next

  const void* row(int64_t i) const {
    return static_cast<const unsigned char*>(data) + i * stride * item_size(dtype);
  }
};

}  // namespace fastmrc
