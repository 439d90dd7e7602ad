// What the autograd nodes of prepared calls have in common.
#pragma once

#include <initializer_list>

#include <torch/csrc/autograd/custom_function.h>

#include "common/front/prepared.h"

namespace petal {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

// Any one of them is trained, and a graph is recorded.
inline bool trains(const variable_list& tensors) {
  bool any = false;
  for (const at::Tensor& t : tensors) any = any || t.requires_grad();
  return any && c10::GradMode::is_enabled();
}

inline bool any_trained(at::TensorList tensors) {
  bool any = false;
  for (const at::Tensor& t : tensors) any = any || t.requires_grad();
  return any;
}

inline c10::IValue list(const std::vector<at::Tensor>& tensors) {
  return c10::List<at::Tensor>(tensors);
}

inline void append(variable_list& to, const std::vector<at::Tensor>& tensors) {
  to.insert(to.end(), tensors.begin(), tensors.end());
}

inline void append(variable_list& to, const std::vector<Optional>& tensors) {
  for (const Optional& t : tensors) {
    if (t) to.push_back(*t);
  }
}

inline PyObject* tuple_of(const variable_list& tensors) {
  THPObjectPtr tuple(PyTuple_New(static_cast<Py_ssize_t>(tensors.size())));
  if (!tuple) return nullptr;
  for (size_t k = 0; k < tensors.size(); ++k) {
    PyTuple_SET_ITEM(tuple.get(), static_cast<Py_ssize_t>(k), THPVariable_Wrap(tensors[k]));
  }
  return tuple.release();
}

// A node keeps the call that made it.
inline void keep_call(AutogradContext* ctx, const Prepared& call) {
  ctx->saved_data["call"] = c10::IValue::make_capsule(
      c10::intrusive_ptr<torch::CustomClassHolder>::unsafe_reclaim_from_nonowning(
          const_cast<Prepared*>(&call)));
}

template <typename Call>
c10::intrusive_ptr<Call> call_of(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<Call>(ctx->saved_data.at("call").toCapsule());
}

// Which of the trained tensors' gradients are asked of a node.
class Needs {
 public:
  Needs(AutogradContext* ctx, size_t count) {
    for (size_t k = 0; k < count; ++k) flags_.push_back(ctx->needs_input_grad(k));
  }
  bool operator[](size_t k) const { return flags_[k]; }
  size_t size() const { return flags_.size(); }
  bool any(size_t from, size_t to) const {
    for (size_t k = from; k < to; ++k) {
      if (flags_[k]) return true;
    }
    return false;
  }

 private:
  std::vector<bool> flags_;
};

// Whether a backward must be seen to run: by a mode or a profiler, by what its tensors are, or by
// autograd itself, which differentiates it again.
inline bool is_seen(std::initializer_list<const variable_list*> lists) {
  bool seen = watched() || c10::GradMode::is_enabled();
  for (const variable_list* tensors : lists) {
    for (const at::Tensor& t : *tensors) seen = seen || (t.defined() && !plain(t));
  }
  return seen;
}

// Python's own backward: whole(node, dys, saved, needs) -> the gradients that are needed, or None.
inline variable_list whole_backward(const Held& whole, const variable_list& dys,
                                    const variable_list& saved, const Needs& needs) {
  pybind11::gil_scoped_acquire locked;
  const auto current = torch::autograd::get_current_node();
  THPObjectPtr node(torch::autograd::functionToPyObject(current));
  THPObjectPtr grads(THPVariable_WrapList(dys)), kept(THPVariable_WrapList(saved));
  THPObjectPtr wanted(PyList_New(static_cast<Py_ssize_t>(needs.size())));
  if (!node || !grads || !kept || !wanted) throw python_error();
  for (size_t k = 0; k < needs.size(); ++k) {
    PyList_SET_ITEM(wanted.get(), static_cast<Py_ssize_t>(k), PyBool_FromLong(needs[k]));
  }
  THPObjectPtr found(PyObject_CallFunctionObjArgs(whole.get(), node.get(), grads.get(), kept.get(),
                                                  wanted.get(), nullptr));
  if (!found) throw python_error();
  return items_of<at::Tensor>(found.get(), [](PyObject* value) {
    return value == Py_None ? at::Tensor() : tensor_of(value);
  });
}

// Gradients as torch's Function wants them: one for every argument of forward, of which the last
// `others` are no tensors.
inline variable_list results(variable_list grads, size_t others) {
  grads.resize(grads.size() + others);
  return grads;
}

}  // namespace petal
