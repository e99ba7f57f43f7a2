// The one door for tensors: any object with __dlpack__ (NumPy, torch, ...), checked once here.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "fastmrc/rows.h"

namespace fastmrc::bindings {

namespace py = pybind11;

// Type codes of DLPack.
enum TypeCode { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

// Where a tensor must be, in the numbers of DLPack.
enum class DeviceType : int32_t { kCpu = 1, kCuda = 2 };

// A tensor on the CPU or a CUDA device, alive as long as this object. Destroy with the GIL held.
class Tensor {
 public:
  // Throws TypeError or ValueError that name the argument.
  Tensor(py::handle object, const char* name, DeviceType device = DeviceType::kCpu);
  ~Tensor();
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  // The tensor as rows of logits: [rows, cols] float32, float16 or bfloat16 with unit stride along
  // a row; a vector is one row.
  Rows rows() const;
  // The tensor as a contiguous vector of this type.
  const int32_t* int32_vector(int64_t* size) const;
  const int64_t* int64_vector(int64_t* size) const;
  const float* float32_vector(int64_t* size) const;
  const uint8_t* uint8_vector(int64_t* size) const;
  // The data of a contiguous tensor of `count` items of this type (a DLPack code and bits; bool and
  // uint8 pass for each other), whatever its shape.
  void* contiguous(int code, int bits, int64_t count) const;

  int device_id() const { return device_id_; }

 private:
  void check_vector(const char* dtype, int code, int bits, int64_t* size) const;
  std::string dtype_name() const;

  std::string name_;
  py::object capsule_;  // owns the tensor: it was not consumed, so its destructor frees it
  const void* data_ = nullptr;
  int device_id_ = 0;
  int code_ = 0;
  int bits_ = 0;
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;  // in elements
};

// Gives a search the logits of its next step, without the GIL.
template <typename Search>
void step_search(Search& search, py::handle logits) {
  const Tensor tensor(logits, "logits");
  const Rows rows = tensor.rows();
  const py::gil_scoped_release release;
  search.step(rows);
}

// Throws IndexError unless 0 <= index < size.
void check_index(const char* name, int64_t index, int64_t size);

// Copies of small vectors.
std::vector<int32_t> int32_values(py::handle object, const char* name);
std::vector<int64_t> int64_values(py::handle object, const char* name);
std::vector<float> float32_values(py::handle object, const char* name);
std::vector<uint8_t> uint8_values(py::handle object, const char* name);

template <typename T>
py::array_t<T> to_array(const T* data, std::vector<py::ssize_t> shape) {
  return py::array_t<T>(std::move(shape), data);
}

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

}  // namespace fastmrc::bindings
