// The Python module lraee._C, in Python's limited API. Importing it registers the CPU
// implementations: each csrc/<operator>.cpp ends with its own CpuOperators, so that a new operator
// changes no shared file. Schemas are defined in lraee/ops/registry.py.

#include <Python.h>

#include "common.h"

namespace {

// What the function returns; null with the error set if it raises.
template <class Function>
PyObject* guarded(const Function& function) {
  try {
    return function();
  } catch (const lraee::ValueError& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* isa(PyObject*, PyObject*) {
  return guarded([] { return PyUnicode_FromString(lraee::cpu::isa_name(lraee::active_isa())); });
}

PyObject* isa_levels(PyObject*, PyObject*) {
  return guarded([] {
    PyObject* const list = PyList_New(0);
    for (const std::string& name : lraee::isa_levels()) {
      PyObject* const item = PyUnicode_FromString(name.c_str());
      PyList_Append(list, item);
      Py_DecRef(item);
    }
    return list;
  });
}

PyObject* set_isa(PyObject*, PyObject* arguments, PyObject* keywords) {
  static char name_keyword[] = "name";
  static char* names[] = {name_keyword, nullptr};
  const char* name = nullptr;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "s", names, &name)) return nullptr;
  return guarded([&] {
    lraee::set_isa(name);
    Py_IncRef(Py_None);
    return Py_None;
  });
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "Name of the instruction-set level that kernels run at."},
    {"isa_levels", isa_levels, METH_NOARGS, "Levels that this machine has, lowest first."},
    {"set_isa", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(set_isa)),
     METH_VARARGS | METH_KEYWORDS,
     "Force a level by name; an empty name goes back to the level chosen at start."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module{.m_base = PyModuleDef_HEAD_INIT,
                   .m_name = "_C",
                   .m_doc = "CPU implementations of torch.ops.lraee.*",
                   .m_size = -1,
                   .m_methods = methods};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
