// Tensors of one call, all on one CUDA device.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings/dlpack.h"
#include "cuda/automata.h"
#include "cuda/platform.h"
#include "fastmrc/rows.h"

namespace fastmrc::bindings {

#if defined(FASTMRC_CUDA_EMULATION)
constexpr DeviceType kDevice = DeviceType::kCpu;
#else
constexpr DeviceType kDevice = DeviceType::kCuda;
#endif

// Lets tensors in and keeps them while it lives. Destroy with the GIL held.
class Door {
 public:
  // A contiguous tensor of `count` items of type T; null for None.
  template <typename T>
  T* array(py::handle object, const char* name, int64_t count) {
    if (object.is_none()) return nullptr;
    return static_cast<T*>(let_in(object, name).contiguous(code_of<T>(), 8 * sizeof(T), count));
  }

  // As array(), which must not be None.
  template <typename T>
  T* required(py::handle object, const char* name, int64_t count) {
    if (object.is_none()) throw py::type_error(std::string(name) + ": expected a tensor, got None");
    return array<T>(object, name, count);
  }

  Rows rows(py::handle object, const char* name) { return let_in(object, name).rows(); }

  int device() const { return device_; }

 private:
  template <typename T>
  static constexpr int code_of() {
    using Plain = std::remove_const_t<T>;
    if (std::is_floating_point_v<Plain>) return kFloat;
    return std::is_signed_v<Plain> ? kInt : kUInt;
  }

  const Tensor& let_in(py::handle object, const char* name) {
    tensors_.push_back(std::make_unique<Tensor>(object, name, kDevice));
    const int device = tensors_.back()->device_id();
    if (device_ >= 0 && device != device_) {
      throw py::value_error(std::string(name) +
                            ": expected a tensor on cuda:" + std::to_string(device_) +
                            " as the others, got cuda:" + std::to_string(device));
    }
    device_ = device;
    return *tensors_.back();
  }

  std::vector<std::unique_ptr<Tensor>> tensors_;
  int device_ = -1;
};

// Automata on the device, as fastmrc.cuda.automata packs them.
struct DeviceAutomata {
  Door door;
  cuda::Automata automata;
};

// Runs an operation on the device of the tensors, without the GIL.
template <typename Run>
void on_device(const Door& door, Run run) {
  const py::gil_scoped_release release;
  const cuda::DeviceGuard guard(door.device());
  run();
}

// The stream of torch, a number.
inline cuda::Stream stream_of(uintptr_t stream) { return reinterpret_cast<cuda::Stream>(stream); }

void register_cuda_ops(py::module_& module);
void register_cuda_beam_search(py::module_& module);

}  // namespace fastmrc::bindings
