// A call that was checked and whose backend and plan were chosen: it takes the tensors alone, for
// every call of the signature that it was made for, and holds none of them.
#pragma once

#include <Python.h>
#include <structmember.h>

#include <mutex>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/custom_class.h>

#include "common/front/signature.h"
#include "common/front/values.h"

namespace petal {

struct Prepared : torch::CustomClassHolder {
  // Python's name of the operator and the number of its tensor arguments.
  const char* name;
  size_t count;

  Prepared(const char* its_name, size_t its_count) : name(its_name), count(its_count) {}

  // Where this call must go the whole way after all: None.
  virtual PyObject* call(PyObject* const* args) = 0;
};

// Whether somebody would see a call pass: a mode, a transform, a profiler.
inline bool watched() {
  return !(normal().now() || inference().now()) || at::impl::torch_function_mode_enabled() ||
         at::hasCallbacks();
}

// A Python object that may be let go by any thread.
class Held {
 public:
  explicit Held(PyObject* object) : object_(object) { Py_INCREF(object); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() {
    if (!Py_IsInitialized()) return;
    pybind11::gil_scoped_acquire locked;
    Py_DECREF(object_);
  }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// The state of the dropout generator, as torch.randint(0, 1 << 62, (2,)) draws it.
inline at::Tensor draw() {
  at::Tensor rng = at::empty({2}, at::TensorOptions().dtype(at::kLong).device(at::kCPU));
  auto* generator = at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  for (int k = 0; k < 2; ++k) {
    rng.mutable_data_ptr<int64_t>()[k] = static_cast<int64_t>(generator->random64() % (1ULL << 62));
  }
  return rng;
}

// What a call reads of the generator: nothing, what it was given, or a state drawn now.
inline std::optional<at::Tensor> mask_state(const std::optional<at::Tensor>& given,
                                            double dropout) {
  if (dropout == 0.0) return std::nullopt;
  return given ? given->contiguous() : draw();
}

// [N, width] with unit stride in the last dim; a copy only where no view has it.
inline at::Tensor flat_rows(const at::Tensor& t) {
  const at::Tensor flat = t.dim() == 2 ? t : t.reshape({-1, t.size(-1)});
  return flat.stride(-1) == 1 || flat.size(-1) == 1 ? flat : flat.contiguous();
}

// Whether t's node offers to form it again in backward (petal_kernels/_runtime/formed.py).
inline bool is_offered(const at::Tensor& t) {
  const auto& node = t.grad_fn();
  if (node == nullptr) return false;
  THPObjectPtr object(torch::autograd::functionToPyObject(node));
  return object && PyObject_HasAttrString(object.get(), "petal_recipe");
}

// -- the Python type ------------------------------------------------------------------------------

struct PreparedObject {
  PyObject_HEAD;
  vectorcallfunc vectorcall;
  Prepared* held;
};

inline PyObject* prepared_call(PyObject* self, PyObject* const* args, size_t flags,
                               PyObject* names) {
  HANDLE_TH_ERRORS
  Prepared* held = reinterpret_cast<PreparedObject*>(self)->held;
  const auto count = static_cast<size_t>(PyVectorcall_NARGS(flags));
  TORCH_CHECK_TYPE(names == nullptr && count == held->count, held->name, ": want ", held->count,
                   " arguments by position, got ", count);
  return held->call(args);
  END_HANDLE_TH_ERRORS
}

inline void prepared_free(PyObject* self) {
  auto* object = reinterpret_cast<PreparedObject*>(self);
  if (object->held != nullptr) c10::raw::intrusive_ptr::decref(object->held);
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

inline PyMemberDef prepared_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(PreparedObject, vectorcall), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

inline PyType_Slot prepared_slots[] = {
    {Py_tp_doc, const_cast<char*>("A call whose checks and choices are made, of its tensors.")},
    {Py_tp_dealloc, reinterpret_cast<void*>(prepared_free)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, prepared_members},
    {0, nullptr},
};

inline PyType_Spec prepared_spec = {
    "petal_kernels._front.Prepared", sizeof(PreparedObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    prepared_slots};

inline PyTypeObject* prepared_type = nullptr;  // set when the module is made

inline PyObject* wrap(c10::intrusive_ptr<Prepared> prepared) {
  auto* object = PyObject_New(PreparedObject, prepared_type);
  if (object == nullptr) return nullptr;
  object->vectorcall = prepared_call;
  object->held = prepared.release();
  return reinterpret_cast<PyObject*>(object);
}

}  // namespace petal
