// Memory that a caller lends to a call: how much it takes and how it is divided.
#pragma once

#include <cstdint>

namespace fastmrc::cuda {

// Divides a block of memory, or only counts if there is none.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  // The next `count` items, aligned for 16-byte accesses; null while only counting.
  template <typename T>
  T* take(int64_t count) {
    T* items = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    constexpr int64_t kAlignment = 16;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return items;
  }

  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace fastmrc::cuda
