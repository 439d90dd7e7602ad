// Python's values as the compiled front takes them, and what it gives back.
#pragma once

#include <Python.h>

#include <optional>
#include <vector>

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace petal {

[[noreturn]] inline void wrong(const char* wanted, PyObject* got) {
  C10_THROW_ERROR(TypeError, c10::str("want ", wanted, ", got ", Py_TYPE(got)->tp_name));
}

inline const at::Tensor& tensor_of(PyObject* value) {
  if (!THPVariable_Check(value)) wrong("a Tensor", value);
  return THPVariable_Unpack(value);
}

inline std::optional<at::Tensor> optional_of(PyObject* value) {
  if (value == Py_None) return std::nullopt;
  return tensor_of(value);
}

inline double float_of(PyObject* value) {
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred()) throw python_error();
  return number;
}

inline int64_t int_of(PyObject* value) {
  const long long number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred()) throw python_error();
  return number;
}

inline bool bool_of(PyObject* value) {
  if (!PyBool_Check(value)) wrong("a bool", value);
  return value == Py_True;
}

// What `each` makes of every item of a list or tuple.
template <typename T, typename Each>
std::vector<T> items_of(PyObject* value, const Each& each) {
  if (!PyList_Check(value) && !PyTuple_Check(value)) wrong("a list", value);
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
  std::vector<T> out;
  out.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) out.push_back(each(PySequence_Fast_GET_ITEM(value, i)));
  return out;
}

inline std::vector<at::Tensor> tensors_of(PyObject* value) {
  return items_of<at::Tensor>(value, tensor_of);
}

// The same as an operator takes it.
template <typename T, typename Each>
c10::IValue list_of(PyObject* value, const Each& each) {
  c10::List<T> out;
  for (const auto& item : items_of<T>(value, each)) out.push_back(item);
  return out;
}

// Runs without the interpreter's lock, which whoever needs it takes again.
struct Unlocked {
  PyThreadState* state = PyEval_SaveThread();
  ~Unlocked() { PyEval_RestoreThread(state); }
};

}  // namespace petal
