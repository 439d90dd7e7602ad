// petal_kernels._front: what a small call spends its time on, compiled for one torch and Python.
//
//   signature(values) -> bytes | None   everything about a call's arguments that its checks and its
//                                       choice of backend look at; None where somebody watches it
//   Op(name)                            an operator of the compiled libraries, called with its
//                                       arguments in the schema's order
//   linears(x, weights) -> ys | None    the library's products x w^T, and
//   sums(dys, weights) -> dx | None     the sum of dy w, in fresh memory; None where it is large
//
// Without this module the same calls run the long way, to the same bits.
#include <Python.h>
#include <structmember.h>

#include <cstring>
#include <string>
#include <vector>

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include "front_signature.h"

namespace petal {
namespace {

PyObject* signature(PyObject*, PyObject* values) {
  HANDLE_TH_ERRORS
  if (!(normal().now() || inference().now()) || at::impl::torch_function_mode_enabled() ||
      at::hasCallbacks()) {
    Py_RETURN_NONE;
  }
  Writer w;
  w.put(static_cast<int8_t>(c10::GradMode::is_enabled() | c10::InferenceMode::is_enabled() << 1 |
                            at::globalContext().deterministicAlgorithms() << 2));
  if (!put(w, values)) Py_RETURN_NONE;
  return w.result();
  END_HANDLE_TH_ERRORS
}

// -- operators ------------------------------------------------------------------------------------

enum class Kind {
  kTensor,
  kOptional,
  kTensors,
  kOptionals,
  kFloats,
  kInts,
  kBools,
  kFloat,
  kInt,
  kBool
};

std::optional<Kind> kind_of(const std::string& type) {
  static const std::pair<const char*, Kind> kinds[] = {
      {"Tensor", Kind::kTensor},       {"Tensor?", Kind::kOptional}, {"Tensor[]", Kind::kTensors},
      {"Tensor?[]", Kind::kOptionals}, {"float[]", Kind::kFloats},   {"int[]", Kind::kInts},
      {"bool[]", Kind::kBools},        {"float", Kind::kFloat},      {"int", Kind::kInt},
      {"bool", Kind::kBool},
  };
  for (const auto& [name, kind] : kinds) {
    if (type == name) return kind;
  }
  return std::nullopt;
}

struct Op {
  PyObject_HEAD;
  vectorcallfunc vectorcall;
  c10::OperatorHandle* handle;
  std::vector<Kind>* kinds;
};

[[noreturn]] void wrong(const char* wanted, PyObject* got) {
  C10_THROW_ERROR(TypeError, c10::str("want ", wanted, ", got ", Py_TYPE(got)->tp_name));
}

const at::Tensor& tensor_of(PyObject* value) {
  if (!THPVariable_Check(value)) wrong("a Tensor", value);
  return THPVariable_Unpack(value);
}

double float_of(PyObject* value) {
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred()) throw python_error();
  return number;
}

int64_t int_of(PyObject* value) {
  const long long number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred()) throw python_error();
  return number;
}

bool bool_of(PyObject* value) {
  if (!PyBool_Check(value)) wrong("a bool", value);
  return value == Py_True;
}

// A list of what `each` makes of every item.
template <typename T, typename Each>
c10::IValue list_of(PyObject* value, const Each& each) {
  if (!PyList_Check(value) && !PyTuple_Check(value)) wrong("a list", value);
  c10::List<T> out;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
  out.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) out.push_back(each(PySequence_Fast_GET_ITEM(value, i)));
  return out;
}

std::optional<at::Tensor> optional_of(PyObject* value) {
  if (value == Py_None) return std::nullopt;
  return tensor_of(value);
}

c10::IValue argument(Kind kind, PyObject* value) {
  switch (kind) {
    case Kind::kTensor: return tensor_of(value);
    case Kind::kOptional: return value == Py_None ? c10::IValue() : c10::IValue(tensor_of(value));
    case Kind::kTensors: return list_of<at::Tensor>(value, tensor_of);
    case Kind::kOptionals: return list_of<std::optional<at::Tensor>>(value, optional_of);
    case Kind::kFloats: return list_of<double>(value, float_of);
    case Kind::kInts: return list_of<int64_t>(value, int_of);
    case Kind::kBools: return list_of<bool>(value, bool_of);
    case Kind::kFloat: return float_of(value);
    case Kind::kInt: return int_of(value);
    case Kind::kBool: break;
  }
  return bool_of(value);
}

PyObject* result(const c10::IValue& value) {
  if (value.isTensor()) return THPVariable_Wrap(value.toTensor());
  TORCH_CHECK(value.isTensorList(), "want a Tensor or a list of them, got ", value.tagKind());
  return THPVariable_WrapList(value.toTensorVector());
}

// Runs without the interpreter's lock, which whoever needs it takes again.
struct Unlocked {
  PyThreadState* state = PyEval_SaveThread();
  ~Unlocked() { PyEval_RestoreThread(state); }
};

PyObject* op_call(PyObject* self, PyObject* const* args, size_t flags, PyObject* names) {
  HANDLE_TH_ERRORS
  const auto* op = reinterpret_cast<Op*>(self);
  const auto count = static_cast<size_t>(PyVectorcall_NARGS(flags));
  TORCH_CHECK_TYPE(names == nullptr && count == op->kinds->size(), op->handle->schema().name(),
                   ": want ", op->kinds->size(), " arguments by position, got ", count);
  torch::jit::Stack stack;
  stack.reserve(count);
  for (size_t i = 0; i < count; ++i) stack.push_back(argument((*op->kinds)[i], args[i]));
  {
    Unlocked unlocked;
    op->handle->callBoxed(stack);
  }
  if (stack.empty()) Py_RETURN_NONE;
  if (stack.size() == 1) return result(stack[0]);
  THPObjectPtr tuple(PyTuple_New(static_cast<Py_ssize_t>(stack.size())));
  for (size_t i = 0; i < stack.size(); ++i) {
    PyTuple_SET_ITEM(tuple.get(), static_cast<Py_ssize_t>(i), result(stack[i]));
  }
  return tuple.release();
  END_HANDLE_TH_ERRORS
}

PyObject* op_new(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  const char* name = nullptr;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  std::vector<Kind> kinds;
  for (const c10::Argument& each : handle.schema().arguments()) {
    const auto kind = kind_of(each.real_type()->str());
    TORCH_CHECK(kind, name, ": no argument of type ", each.real_type()->str(), " can be passed");
    kinds.push_back(*kind);
  }
  auto* op = reinterpret_cast<Op*>(type->tp_alloc(type, 0));
  if (op == nullptr) return nullptr;
  op->vectorcall = op_call;
  op->handle = new c10::OperatorHandle(handle);
  op->kinds = new std::vector<Kind>(std::move(kinds));
  return reinterpret_cast<PyObject*>(op);
  END_HANDLE_TH_ERRORS
}

void op_free(PyObject* self) {
  auto* op = reinterpret_cast<Op*>(self);
  delete op->handle;
  delete op->kinds;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef op_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Op, vectorcall), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot op_slots[] = {
    {Py_tp_doc, const_cast<char*>("An operator without overloads, by its qualified name.")},
    {Py_tp_new, reinterpret_cast<void*>(op_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(op_free)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, op_members},
    {0, nullptr},
};

PyType_Spec op_spec = {"petal_kernels._front.Op", sizeof(Op), 0,
                       Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, op_slots};

// -- products of the library ----------------------------------------------------------------------

constexpr int64_t kLarge = 4 << 20;  // bytes; larger memory is asked for in another way

std::vector<at::Tensor> tensors_of(PyObject* value) {
  if (!PyList_Check(value) && !PyTuple_Check(value)) wrong("a list", value);
  std::vector<at::Tensor> out;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i) {
    out.push_back(tensor_of(PySequence_Fast_GET_ITEM(value, i)));
  }
  return out;
}

PyObject* linears(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "linears: want x and weights");
  const at::Tensor& x = tensor_of(args[0]);
  const std::vector<at::Tensor> weights = tensors_of(args[1]);
  for (const at::Tensor& w : weights) {
    if (x.size(0) * w.size(0) * x.element_size() >= kLarge) Py_RETURN_NONE;
  }
  std::vector<at::Tensor> ys;
  {
    Unlocked unlocked;
    for (const at::Tensor& w : weights) {
      ys.push_back(at::empty({x.size(0), w.size(0)}, x.options()));
      at::mm_out(ys.back(), x, w.t());
    }
  }
  return THPVariable_WrapList(ys);
  END_HANDLE_TH_ERRORS
}

PyObject* sums(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "sums: want dys and weights");
  const std::vector<at::Tensor> dys = tensors_of(args[0]), weights = tensors_of(args[1]);
  TORCH_CHECK(!dys.empty() && dys.size() == weights.size(), "sums: want a weight for every dy");
  const int64_t rows = dys[0].size(0), width = weights[0].size(1);
  if (rows * width * dys[0].element_size() >= kLarge) Py_RETURN_NONE;
  at::Tensor dx;
  {
    Unlocked unlocked;
    dx = at::empty({rows, width}, dys[0].options());
    at::mm_out(dx, dys[0], weights[0]);
    for (size_t k = 1; k < dys.size(); ++k) dx.addmm_(dys[k], weights[k]);
  }
  return THPVariable_Wrap(dx);
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"signature", signature, METH_O,
     "What decides about a call, as bytes; None where it is watched."},
    {"linears", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(linears)), METH_FASTCALL,
     "x w^T for every weight."},
    {"sums", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(sums)), METH_FASTCALL,
     "The sum of dy w."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_front",
                      "Short ways for small calls.",
                      -1,
                      functions,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace
}  // namespace petal

PyMODINIT_FUNC PyInit__front() {
  PyObject* made = PyModule_Create(&petal::module);
  PyObject* type = made == nullptr ? nullptr : PyType_FromSpec(&petal::op_spec);
  if (type == nullptr || PyModule_AddObject(made, "Op", type) < 0) {
    Py_XDECREF(type);
    Py_XDECREF(made);
    return nullptr;
  }
  return made;
}
