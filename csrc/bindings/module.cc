#include <pybind11/pybind11.h>

#include <string>

#include "bindings/register.h"
#include "core/thread_pool.h"
#include "cpu/kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native engine of fastmrc; use the Python modules above it.";
  fastmrc::bindings::register_automata(module);
  fastmrc::bindings::register_ops(module);
  fastmrc::bindings::register_beam_search(module);
  fastmrc::bindings::register_sampling(module);

  module.def("num_threads", &fastmrc::num_threads);
  module.def("set_num_threads", &fastmrc::set_num_threads, py::arg("n"));
  module.def("isa", [] { return std::string(fastmrc::isa_name(fastmrc::active_isa())); });
  module.def("compiler", [] { return std::string(FASTMRC_COMPILER); });
  module.def("version", [] { return std::string(FASTMRC_VERSION); });
  // A wrong FASTMRC_FORCE_ISA fails the import, not the first call.
  fastmrc::kernels();
}
