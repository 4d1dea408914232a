#pragma once

#include <Python.h>

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

// torch's stable ABI has no exception that becomes a ValueError or a TypeError: its own errors all
// become RuntimeError. What torch lets through as it is, is pybind11's exception for "an error of
// Python's own", which sets the error itself. This is its declaration, the same since pybind11 2.0:
// C++ knows an exception by its name, so torch's handler catches these. Should a later torch know
// it no more, it is still a std::runtime_error: the same line, as a RuntimeError.
// https://github.com/pybind/pybind11/blob/master/include/pybind11/detail/common.h
namespace pybind11 {
class __attribute__((visibility("default"))) builtin_exception : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  virtual void set_error() const = 0;
};
}  // namespace pybind11

namespace lraee {

class ValueError : public pybind11::builtin_exception {
 public:
  using builtin_exception::builtin_exception;
  void set_error() const override { PyErr_SetString(PyExc_ValueError, what()); }
};

class TypeError : public pybind11::builtin_exception {
 public:
  using builtin_exception::builtin_exception;
  void set_error() const override { PyErr_SetString(PyExc_TypeError, what()); }
};

// The arguments one behind the other; lists as [2, 3]. No stream: those of GCC 9 and newer need a
// libstdc++ that manylinux_2_28 does not promise.
inline void append(std::string& line, std::string_view word) { line += word; }
inline void append(std::string& line, int64_t number) { line += std::to_string(number); }
void append(std::string& line, double number);
template <class T>
void append(std::string& line, std::span<T> list) {
  line += '[';
  for (size_t i = 0; i < list.size(); ++i) {
    if (i > 0) line += ", ";
    append(line, list[i]);
  }
  line += ']';
}
template <class... Words>
std::string text(const Words&... words) {
  std::string line;
  (append(line, words), ...);
  return line;
}

}  // namespace lraee

// Raise the line that the further arguments make unless the condition holds.
#define LRAEE_CHECK_VALUE(condition, ...) \
  if (!(condition)) [[unlikely]]          \
  throw ::lraee::ValueError(::lraee::text(__VA_ARGS__))
#define LRAEE_CHECK_TYPE(condition, ...) \
  if (!(condition)) [[unlikely]]         \
  throw ::lraee::TypeError(::lraee::text(__VA_ARGS__))
