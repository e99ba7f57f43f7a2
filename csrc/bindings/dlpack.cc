#include "bindings/dlpack.h"

#include <limits>

namespace fastmrc::bindings {
namespace {

// The binary interface of DLPack (github.com/dmlc/dlpack, version 1.0), as far as it is read here.
struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // null: row-major
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
  struct {
    uint32_t major, minor;
  } version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor dl_tensor;
};

std::string type_name(py::handle object) {
  return py::cast<std::string>(py::type::of(object).attr("__name__"));
}

// Version 1 is asked for because only it can say "read-only"; older producers know no versions. A
// stream of -1: the producer does not wait, as the work is enqueued on the stream it uses itself.
py::object call_dlpack(const py::object& object, DeviceType device) {
  py::dict arguments;
  if (device == DeviceType::kCuda) arguments["stream"] = -1;
  try {
    return object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0), **arguments);
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return object.attr("__dlpack__")(**arguments);
}

// A tensor that requires gradients refuses to be exported; its data is all that is read here.
bool requires_grad(const py::object& object) {
  const py::object flag = py::getattr(object, "requires_grad", py::none());
  return py::isinstance<py::bool_>(flag) && flag.cast<bool>();
}

std::string device_name(int type, int id) {
  if (type == static_cast<int>(DeviceType::kCpu)) return "cpu";
  if (type == static_cast<int>(DeviceType::kCuda)) return "cuda:" + std::to_string(id);
  return "DLPack type " + std::to_string(type);
}

std::string expected_place(const std::string& name, DeviceType device) {
  return name + ": expected a tensor on " +
         (device == DeviceType::kCpu ? "the CPU" : "a CUDA device");
}

void require_device(const std::string& name, int type, int id, DeviceType device) {
  if (type == static_cast<int>(device)) return;
  throw py::value_error(expected_place(name, device) + ", got device " + device_name(type, id));
}

// Why the object cannot be exported, if it is for its device.
void check_device(const py::object& object, const std::string& name, DeviceType expected) {
  if (!py::hasattr(object, "__dlpack_device__")) return;
  std::pair<int, int> device;
  try {
    device = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  } catch (const py::error_already_set& error) {  // torch: a device that DLPack does not know
    throw py::value_error(expected_place(name, expected) + ", got " + type_name(object) + " (" +
                          std::string(py::str(error.value())) + ")");
  }
  require_device(name, device.first, device.second, expected);
}

py::object export_capsule(const py::object& object, const std::string& name, DeviceType device) {
  try {
    try {
      return call_dlpack(object, device);
    } catch (const py::error_already_set&) {
      if (!requires_grad(object)) throw;
    }
    return call_dlpack(object.attr("detach")(), device);
  } catch (const py::error_already_set& error) {
    check_device(object, name, device);
    throw py::type_error(name + ": expected a tensor that DLPack can export, got " +
                         type_name(object) + " (" + std::string(py::str(error.value())) + ")");
  }
}

const DLTensor& tensor_of(const py::object& capsule, const std::string& name) {
  PyObject* raw = capsule.ptr();
  if (PyCapsule_IsValid(raw, "dltensor_versioned") != 0) {
    return static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(raw, "dltensor_versioned"))
        ->dl_tensor;
  }
  if (PyCapsule_IsValid(raw, "dltensor") != 0) {
    return static_cast<DLManagedTensor*>(PyCapsule_GetPointer(raw, "dltensor"))->dl_tensor;
  }
  throw py::type_error(name + ": expected __dlpack__ to return a fresh DLPack capsule");
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

}  // namespace

Tensor::Tensor(py::handle object, const char* name, DeviceType device) : name_(name) {
  if (!py::hasattr(object, "__dlpack__")) {
    throw py::type_error(name_ +
                         ": expected a NumPy array, torch tensor or other DLPack object, "
                         "got " +
                         type_name(object));
  }
  // All is tried first and explained after: the door is passed for every tensor of every call.
  capsule_ = export_capsule(py::reinterpret_borrow<py::object>(object), name_, device);
  const DLTensor& tensor = tensor_of(capsule_, name_);
  require_device(name_, tensor.device.device_type, tensor.device.device_id, device);
  device_id_ = tensor.device.device_id;
  if (tensor.dtype.lanes != 1) throw py::type_error(name_ + ": expected scalar elements");
  data_ = static_cast<const unsigned char*>(tensor.data) + tensor.byte_offset;
  code_ = tensor.dtype.code;
  bits_ = tensor.dtype.bits;
  shape_.assign(tensor.shape, tensor.shape + tensor.ndim);
  strides_.resize(shape_.size());
  int64_t stride = 1;
  for (size_t i = shape_.size(); i-- > 0;) {
    strides_[i] = tensor.strides == nullptr ? stride : tensor.strides[i];
    stride *= shape_[i];
  }
}

Tensor::~Tensor() = default;

std::string Tensor::dtype_name() const {
  const char* kind = code_ == kInt      ? "int"
                     : code_ == kUInt   ? "uint"
                     : code_ == kFloat  ? "float"
                     : code_ == kBfloat ? "bfloat"
                     : code_ == kBool   ? "bool"
                                        : "DLPack type ";
  return code_ == kBool ? kind : kind + std::to_string(code_ > kBool ? code_ : bits_);
}

Rows Tensor::rows() const {
  if (shape_.empty() || shape_.size() > 2) {
    throw py::value_error(name_ + ": expected 1 or 2 dimensions, got " +
                          std::to_string(shape_.size()));
  }
  Rows rows;
  if (code_ == kFloat && bits_ == 32) {
    rows.dtype = DType::kFloat32;
  } else if (code_ == kFloat && bits_ == 16) {
    rows.dtype = DType::kFloat16;
  } else if (code_ == kBfloat && bits_ == 16) {
    rows.dtype = DType::kBFloat16;
  } else {
    throw py::type_error(name_ + ": expected float32, float16 or bfloat16, got " + dtype_name());
  }
  rows.data = data_;
  rows.cols = shape_.back();
  rows.rows = shape_.size() == 2 ? shape_[0] : 1;
  rows.stride = shape_.size() == 2 ? strides_[0] : rows.cols;
  if (rows.cols < 1 || rows.cols > std::numeric_limits<int32_t>::max()) {
    throw py::value_error(name_ +
                          ": expected at least one and fewer than 2^31 columns, got shape " +
                          shape_text(shape_));
  }
  if (rows.rows > 0 && rows.cols > 1 && strides_.back() != 1) {
    throw py::value_error(name_ + ": expected rows that are contiguous in memory, got stride " +
                          std::to_string(strides_.back()) +
                          "; make it contiguous first (numpy.ascontiguousarray, "
                          "tensor.contiguous())");
  }
  return rows;
}

void Tensor::check_vector(const char* dtype, int code, int bits, int64_t* size) const {
  if (shape_.size() != 1) {
    throw py::value_error(name_ + ": expected 1 dimension, got " + std::to_string(shape_.size()));
  }
  if (code_ != code || bits_ != bits) {
    throw py::type_error(name_ + ": expected " + dtype + ", got " + dtype_name());
  }
  if (shape_[0] > 1 && strides_[0] != 1) {
    throw py::value_error(name_ + ": expected a contiguous vector, got stride " +
                          std::to_string(strides_[0]));
  }
  *size = shape_[0];
}

void* Tensor::contiguous(int code, int bits, int64_t count) const {
  const bool bytes = bits == 8 && bits_ == 8 && (code_ == kBool || code_ == kUInt);
  if (!bytes && (code_ != code || bits_ != bits)) {
    throw py::type_error(name_ + ": expected DLPack type " + std::to_string(code) + " of " +
                         std::to_string(bits) + " bits, got " + dtype_name());
  }
  int64_t items = 1;
  bool dense = true;
  for (size_t i = shape_.size(); i-- > 0;) {
    dense = dense && (shape_[i] == 1 || strides_[i] == items);
    items *= shape_[i];
  }
  if (!dense && items > 0) throw py::value_error(name_ + ": expected a contiguous tensor");
  if (items != count) {
    throw py::value_error(name_ + ": expected " + std::to_string(count) + " items, got shape " +
                          shape_text(shape_));
  }
  return const_cast<void*>(data_);
}

const int32_t* Tensor::int32_vector(int64_t* size) const {
  check_vector("int32", kInt, 32, size);
  return static_cast<const int32_t*>(data_);
}

const int64_t* Tensor::int64_vector(int64_t* size) const {
  check_vector("int64", kInt, 64, size);
  return static_cast<const int64_t*>(data_);
}

const float* Tensor::float32_vector(int64_t* size) const {
  check_vector("float32", kFloat, 32, size);
  return static_cast<const float*>(data_);
}

const uint8_t* Tensor::uint8_vector(int64_t* size) const {
  check_vector("uint8", kUInt, 8, size);
  return static_cast<const uint8_t*>(data_);
}

namespace {

// What the Python layer itself makes needs no protocol: it hands over contiguous NumPy vectors.
template <typename T>
bool copy_numpy(py::handle object, std::vector<T>& values) {
  if (!py::isinstance<py::array_t<T, py::array::c_style>>(object)) return false;
  const auto array = py::reinterpret_borrow<py::array_t<T, py::array::c_style>>(object);
  if (array.ndim() != 1) return false;
  values.assign(array.data(), array.data() + array.size());
  return true;
}

template <typename T>
std::vector<T> values_of(py::handle object, const char* name,
                         const T* (Tensor::*vector)(int64_t*) const) {
  std::vector<T> values;
  if (copy_numpy(object, values)) return values;
  const Tensor tensor(object, name);
  int64_t size = 0;
  const T* data = (tensor.*vector)(&size);
  return {data, data + size};
}

}  // namespace

std::vector<int32_t> int32_values(py::handle object, const char* name) {
  return values_of(object, name, &Tensor::int32_vector);
}

std::vector<int64_t> int64_values(py::handle object, const char* name) {
  return values_of(object, name, &Tensor::int64_vector);
}

std::vector<float> float32_values(py::handle object, const char* name) {
  return values_of(object, name, &Tensor::float32_vector);
}

std::vector<uint8_t> uint8_values(py::handle object, const char* name) {
  return values_of(object, name, &Tensor::uint8_vector);
}

void check_index(const char* name, int64_t index, int64_t size) {
  if (index >= 0 && index < size) return;
  throw py::index_error(std::string(name) + ": expected below " + std::to_string(size) + ", got " +
                        std::to_string(index));
}

}  // namespace fastmrc::bindings
