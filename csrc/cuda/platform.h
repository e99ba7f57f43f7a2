// What the kernels are written in: CUDA C++, or its emulation on the host for tests
// (tests/cpp/cuda_emulation). The one place that launches kernels and checks for errors.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(FASTMRC_CUDA_EMULATION)
#include "emulation.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace fastmrc::cuda {

using Stream = cudaStream_t;

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

#if !defined(FASTMRC_CUDA_EMULATION)
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
#endif

// Blocks are numbered in one dimension, as only that one reaches beyond 65,535.
inline void check_grid(int64_t blocks, const char* name) {
  if (blocks >= 0 && blocks < (int64_t{1} << 31)) return;
  throw std::invalid_argument(std::string(name) + ": expected fewer than 2^31 blocks, got " +
                              std::to_string(blocks));
}

// Enqueues `blocks` blocks of `threads` threads; nothing for no blocks. Throws if the launch fails.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            Stream stream, const Arguments&... arguments) {
  check_grid(blocks, name);
  if (blocks == 0) return;
#if defined(FASTMRC_CUDA_EMULATION)
  static_cast<void>(stream);
  emulation::run(dim3(static_cast<unsigned>(blocks)), static_cast<unsigned>(threads),
                 [&] { kernel(arguments...); });
#else
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
#endif
}

// Makes a device current while it lives.
class DeviceGuard {
 public:
#if defined(FASTMRC_CUDA_EMULATION)
  explicit DeviceGuard(int) {}
#else
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);  // where it stayed, this would make a context there
  }

 private:
  int before_ = 0;
  bool changed_ = false;

 public:
#endif
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

}  // namespace fastmrc::cuda
