// An operator of the compiled libraries, called with its arguments in the schema's order.
#pragma once

#include <Python.h>
#include <structmember.h>

#include <string>
#include <vector>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/object_ptr.h>

#include "common/front/values.h"

namespace petal {

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

inline std::optional<Kind> kind_of(const std::string& type) {
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

inline c10::IValue argument(Kind kind, PyObject* value) {
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

inline PyObject* result(const c10::IValue& value) {
  if (value.isTensor()) return THPVariable_Wrap(value.toTensor());
  TORCH_CHECK(value.isTensorList(), "want a Tensor or a list of them, got ", value.tagKind());
  return THPVariable_WrapList(value.toTensorVector());
}

inline PyObject* op_call(PyObject* self, PyObject* const* args, size_t flags, PyObject* names) {
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

inline PyObject* op_new(PyTypeObject* type, PyObject* args, PyObject*) {
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

inline void op_free(PyObject* self) {
  auto* op = reinterpret_cast<Op*>(self);
  delete op->handle;
  delete op->kinds;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

inline PyMemberDef op_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Op, vectorcall), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

inline PyType_Slot op_slots[] = {
    {Py_tp_doc, const_cast<char*>("An operator without overloads, by its qualified name.")},
    {Py_tp_new, reinterpret_cast<void*>(op_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(op_free)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, op_members},
    {0, nullptr},
};

inline PyType_Spec op_spec = {"petal_kernels._front.Op", sizeof(Op), 0,
                              Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, op_slots};

}  // namespace petal
