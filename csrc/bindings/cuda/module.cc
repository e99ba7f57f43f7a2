// The extension fastmrc._cuda: kernels on tensors that DLPack hands over. Linked to the static CUDA
// runtime, it loads on machines without a driver and says there that there is no device.
#include <pybind11/pybind11.h>

#include "bindings/cuda/door.h"
#include "cuda/fault.h"
#include "cuda/row_pass.h"

namespace py = pybind11;

namespace {

int device_count() {
#if defined(FASTMRC_CUDA_EMULATION)
  return 0;
#else
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
#endif
}

bool runs_on(int device) {
#if !defined(FASTMRC_CUDA_EMULATION)
  if (device < 0 || device >= device_count()) return false;
#endif
  const fastmrc::cuda::DeviceGuard guard(device);
  return fastmrc::cuda::runs_on_device();
}

bool is_emulated() {
#if defined(FASTMRC_CUDA_EMULATION)
  return true;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of fastmrc; use the Python modules above it.";
  module.attr("MAX_TOPK") = fastmrc::cuda::kMaxTopk;
  module.attr("NO_FAULT") = fastmrc::cuda::kNoFault;
  module.def("device_count", &device_count);
  module.def("runs_on", &runs_on, py::arg("device"));
  module.def("is_emulated", &is_emulated);
  module.def("fault_message", &fastmrc::cuda::fault_message, py::arg("code"), py::arg("name"),
             py::arg("vocabulary_size"), py::arg("end_id"));
#if defined(FASTMRC_CUDA_EMULATION)
  module.def("set_order", &emulation::set_order, py::arg("seed"));
#endif
  fastmrc::bindings::register_cuda_ops(module);
  fastmrc::bindings::register_cuda_beam_search(module);
}
