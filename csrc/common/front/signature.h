// What of a call's arguments decides about it, as bytes.
#pragma once

#include <Python.h>

#include <cstring>

#include <ATen/core/Tensor.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

namespace petal {

using c10::DispatchKey;
using c10::DispatchKeySet;

// What the thread dispatches by where nobody has asked for anything: modes, transforms, tracers,
// autocast and code below autograd all change it.
struct Quiet {
  uint64_t included, excluded;

  bool now() const {
    const auto keys = c10::impl::tls_local_dispatch_key_set();
    return keys.included_.raw_repr() == included && keys.excluded_.raw_repr() == excluded;
  }
};

inline Quiet normal() {
  return {c10::default_included_set.raw_repr(), c10::default_excluded_set.raw_repr()};
}

inline Quiet inference() {
  return {c10::default_included_set.remove(DispatchKey::ADInplaceOrView).raw_repr(),
          (c10::default_excluded_set | c10::autograd_dispatch_keyset).raw_repr()};
}

// The bytes of one signature: all of a call's, or none.
class Writer {
 public:
  template <typename T>
  void put(T value) {
    bytes(&value, sizeof(T));
  }

  void bytes(const void* data, size_t size) {
    full_ = full_ || size > sizeof(buffer_) - used_;
    if (full_) return;
    std::memcpy(buffer_ + used_, data, size);
    used_ += size;
  }

  PyObject* result() const {
    if (full_) Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(buffer_, static_cast<Py_ssize_t>(used_));
  }

 private:
  char buffer_[8192];
  size_t used_ = 0;
  bool full_ = false;
};

// A plain tensor of the CPU or a GPU, as it is or in inference mode: no other key, no tangent.
inline bool plain(const at::Tensor& t) {
  // Every tensor has autocast's keys: whether it acts is the thread's to say.
  const DispatchKeySet keys = t.key_set() - c10::autocast_dispatch_keyset;
  const bool cuda = t.is_cuda();
  if (!cuda && !t.is_cpu()) return false;
  const DispatchKeySet dense(cuda ? DispatchKey::CUDA : DispatchKey::CPU);
  if (keys == dense) return true;
  const auto autograd = cuda ? DispatchKey::AutogradCUDA : DispatchKey::AutogradCPU;
  if (keys != (dense | DispatchKeySet({DispatchKey::ADInplaceOrView, autograd}))) return false;
  return !t._fw_grad(0).defined();
}

inline bool put_tensor(Writer& w, PyObject* value) {
  const at::Tensor& t = THPVariable_Unpack(value);
  if (!t.defined() || !plain(t)) return false;
  const int8_t flags = static_cast<int8_t>(t.requires_grad() | t.is_inference() << 1);
  const int8_t head[] = {'t',
                         static_cast<int8_t>(t.scalar_type()),
                         static_cast<int8_t>(t.device().type()),
                         static_cast<int8_t>(t.device().index()),
                         flags,
                         static_cast<int8_t>(t.dim())};
  w.bytes(head, sizeof(head));
  w.bytes(t.sizes().data(), t.sizes().size() * sizeof(int64_t));
  w.bytes(t.strides().data(), t.strides().size() * sizeof(int64_t));
  return true;
}

inline bool put(Writer& w, PyObject* value);

inline bool put_items(Writer& w, char tag, PyObject* const* items, Py_ssize_t count) {
  w.put(tag);
  w.put(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!put(w, items[i])) return false;
  }
  return true;
}

// False for what is not known to be compared by value.
inline bool put(Writer& w, PyObject* value) {
  if (value == Py_None) return w.put('n'), true;
  if (THPVariable_CheckExact(value)) return put_tensor(w, value);
  if (PyBool_Check(value)) return w.put(value == Py_True ? 'T' : 'F'), true;
  if (PyFloat_CheckExact(value)) return w.put('f'), w.put(PyFloat_AS_DOUBLE(value)), true;
  if (PyLong_CheckExact(value)) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    return w.put('i'), w.put(number), overflow == 0;
  }
  if (PyUnicode_CheckExact(value)) {
    Py_ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(value, &size);
    if (data == nullptr) return PyErr_Clear(), false;
    return w.put('s'), w.put(size), w.bytes(data, static_cast<size_t>(size)), true;
  }
  if (THPDtype_Check(value)) {
    return w.put('d'), w.put(reinterpret_cast<THPDtype*>(value)->scalar_type), true;
  }
  if (PyTuple_Check(value) || PyList_CheckExact(value)) {
    const char tag = PyTuple_Check(value) ? '(' : '[';
    return put_items(w, tag, PySequence_Fast_ITEMS(value), Py_SIZE(value));
  }
  return false;
}

}  // namespace petal
