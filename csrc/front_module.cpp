// petal_kernels._front: what a small call spends its time on, compiled for one torch and Python.
//
//   signature(values) -> bytes | None   everything about a call's arguments that its checks and its
//                                       choice of backend look at; None where somebody watches it
//   Op(name)                            an operator of the compiled libraries, called with its
//                                       arguments in the schema's order
//   linears(x, weights) -> ys | None    the library's products x w^T, and
//   sums(dys, weights) -> dx | None     the sum of dy w, in fresh memory; None where it is large
//   lowrank_linear(...) -> Prepared     an operator's calls of one signature, with their gradients:
//   gated_mlp(...) -> Prepared          called with the tensors alone; None: go the whole way
//   draw() -> rng                       torch.randint(0, 1 << 62, (2,)) of the CPU's generator
//
// Without this module the same calls run the long way, to the same bits.
#include <Python.h>

#include <vector>

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include "common/front/op.h"
#include "common/front/prepared.h"
#include "common/front/signature.h"
#include "gated_mlp/front/call.h"
#include "lowrank_linear/front/call.h"

namespace petal {
namespace {

PyObject* signature(PyObject*, PyObject* values) {
  HANDLE_TH_ERRORS
  if (watched()) Py_RETURN_NONE;
  Writer w;
  w.put(static_cast<int8_t>(c10::GradMode::is_enabled() | c10::InferenceMode::is_enabled() << 1 |
                            at::globalContext().deterministicAlgorithms() << 2));
  if (!put(w, values)) Py_RETURN_NONE;
  return w.result();
  END_HANDLE_TH_ERRORS
}

// -- products of the library ----------------------------------------------------------------------

constexpr int64_t kLarge = 4 << 20;  // bytes; larger memory is asked for in another way

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

PyObject* drawn(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  at::Tensor rng;
  {
    Unlocked unlocked;
    rng = draw();
  }
  return THPVariable_Wrap(rng);
  END_HANDLE_TH_ERRORS
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef functions[] = {
    {"signature", signature, METH_O,
     "What decides about a call, as bytes; None where it is watched."},
    {"linears", fast(linears), METH_FASTCALL, "x w^T for every weight."},
    {"sums", fast(sums), METH_FASTCALL, "The sum of dy w."},
    {"lowrank_linear", fast(lowrank_linear), METH_FASTCALL, "Its calls of one signature."},
    {"gated_mlp", fast(gated_mlp), METH_FASTCALL, "Its calls of one signature."},
    {"draw", drawn, METH_NOARGS, "A state of the dropout generator, as torch.randint draws it."},
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

namespace {

bool add_type(PyObject* made, const char* name, PyType_Spec* spec) {
  PyObject* type = PyType_FromSpec(spec);
  if (type == nullptr) return false;
  if (PyModule_AddObject(made, name, type) < 0) return Py_DECREF(type), false;
  return true;
}

}  // namespace

PyMODINIT_FUNC PyInit__front() {
  PyObject* made = PyModule_Create(&petal::module);
  if (made == nullptr) return nullptr;
  if (!add_type(made, "Op", &petal::op_spec) ||
      !add_type(made, "Prepared", &petal::prepared_spec)) {
    Py_DECREF(made);
    return nullptr;
  }
  PyObject* prepared = PyObject_GetAttrString(made, "Prepared");
  petal::prepared_type = reinterpret_cast<PyTypeObject*>(prepared);
  return made;
}
