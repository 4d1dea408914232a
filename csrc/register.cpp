// The Python module lraee._C. Importing it registers the CPU implementations: each
// csrc/<operator>.cpp ends with its own TORCH_LIBRARY_IMPL, so that a new operator changes no
// shared file. Schemas are defined in lraee/ops/registry.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common.h"

// torch's exceptions are std::exception; pybind11 would make each a RuntimeError.
#include <c10/util/Exception.h>

PYBIND11_MODULE(_C, m) {
  pybind11::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const c10::ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
    }
  });
  m.doc() = "CPU implementations of torch.ops.lraee.*";
  m.def(
      "isa", [] { return std::string(lraee::cpu::isa_name(lraee::active_isa())); },
      "Name of the instruction-set level that kernels run at.");
  m.def("isa_levels", &lraee::isa_levels, "Levels that this machine has, lowest first.");
  m.def("set_isa", &lraee::set_isa, pybind11::arg("name"),
        "Force a level by name; an empty name goes back to the level chosen at start.");
}
