// Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011). A number is a function of key and counter alone, so it
// does not depend on who asks for it, when, or after what.
#pragma once

#include <array>
#include <cstdint>

// Kernels draw the same numbers as the CPU.
#if defined(__CUDACC__)
#define FASTMRC_HOST_DEVICE __host__ __device__
#else
#define FASTMRC_HOST_DEVICE
#endif

namespace fastmrc {

// Replaces the counter [4] by the random words of it.
FASTMRC_HOST_DEVICE inline void philox(uint64_t key, uint32_t* counter) {
  auto low = static_cast<uint32_t>(key);
  auto high = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter[2];
    counter[0] = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ low;
    counter[1] = static_cast<uint32_t>(b);
    counter[2] = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ high;
    counter[3] = static_cast<uint32_t>(a);
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
}

inline std::array<uint32_t, 4> philox(uint64_t key, std::array<uint32_t, 4> counter) {
  philox(key, counter.data());
  return counter;
}

// Number `position` of a stream, a multiple of 2^-53 in [0, 1).
FASTMRC_HOST_DEVICE inline double uniform(uint64_t seed, uint64_t stream, uint32_t position) {
  uint32_t word[] = {static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32), position,
                     0};
  philox(seed, word);
  const uint64_t bits = (uint64_t{word[0]} << 32) | word[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace fastmrc
