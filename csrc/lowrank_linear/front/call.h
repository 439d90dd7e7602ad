// lowrank_linear on the C++ CPU kernels, from Python's call to autograd's node and back, for small
// calls without hidden, core or a given base. What is computed and kept, and in which order, is
// petal_kernels/ops/lowrank_linear/{function,native_impl}.py's, to the bit.
#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>

#include "common/front/prepared.h"

namespace petal {

struct LowrankTensors {
  at::Tensor x;                                   // [..., D]
  std::vector<at::Tensor> downs, ups, weights;    // [R, D] or K of [R_k, D], [O_k, R_k], [O_k, D]
  std::vector<std::optional<at::Tensor>> biases;  // [O_k]
  std::optional<at::Tensor> rng;
};

struct LowrankCall;

struct LowrankLinearFunction : torch::autograd::Function<LowrankLinearFunction> {
  using Context = torch::autograd::AutogradContext;
  // `trained` is x, downs, ups and the biases that are there, in this order.
  static torch::autograd::variable_list forward(Context* ctx, at::TensorList trained,
                                                const LowrankTensors& t, const LowrankCall& call);
  static torch::autograd::variable_list backward(Context* ctx,
                                                 const torch::autograd::variable_list& dys);
};

struct LowrankCall final : Prepared {
  c10::IValue scales;
  double dropout;
  int64_t site;
  bool base_by_library, dx_by_library, apart;  // apart: downs are contracted one by one
  std::vector<bool> has_bias;
  Held whole;  // Python's backward, for one that is watched or differentiated again
  c10::OperatorHandle forward_op, backward_op;

  explicit LowrankCall(PyObject* const* given)
      : Prepared("lowrank_linear", 6),
        scales(list_of<double>(given[0], float_of)),
        dropout(float_of(given[1])),
        site(int_of(given[2])),
        base_by_library(bool_of(given[3])),
        dx_by_library(bool_of(given[4])),
        apart(bool_of(given[5])),
        has_bias(items_of<bool>(given[6], bool_of)),
        whole(given[7]),
        forward_op(find("petal_native::lowrank_linear_fwd")),
        backward_op(find("petal_native::lowrank_linear_bwd")) {}

  static c10::OperatorHandle find(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  }

  PyObject* call(PyObject* const* args) override;
  std::vector<at::Tensor> forward(const LowrankTensors& t, at::Tensor& h) const;
};

inline c10::IValue list(const std::vector<at::Tensor>& tensors) {
  return c10::List<at::Tensor>(tensors);
}

// Below autograd: every y [..., O_k], and h [N, R].
inline std::vector<at::Tensor> LowrankCall::forward(const LowrankTensors& t, at::Tensor& h) const {
  const at::Tensor x = flat_rows(t.x);
  std::vector<at::Tensor> ys, rows;
  std::vector<int64_t> shape = t.x.sizes().vec();
  int64_t middle = 0;
  for (const at::Tensor& down : t.downs) middle += down.size(0);
  for (size_t k = 0; k < t.ups.size(); ++k) {
    shape.back() = t.ups[k].size(0);
    ys.push_back(at::empty(shape, x.options()));
    rows.push_back(ys[k].view({x.size(0), shape.back()}));
    if (base_by_library) at::mm_out(rows[k], x, t.weights[k].t());
  }
  h = at::empty({x.size(0), middle}, x.options());
  const bool joined = !apart && t.downs.size() > 1;
  c10::List<std::optional<at::Tensor>> biases(t.biases);
  torch::jit::Stack stack{x,
                          joined ? list({at::cat(t.downs)}) : list(t.downs),
                          c10::IValue(),
                          list(t.ups),
                          base_by_library ? list({}) : list(t.weights),
                          biases,
                          base_by_library ? list(rows) : list({}),
                          c10::IValue(),
                          t.rng,
                          scales,
                          dropout,
                          site,
                          list(rows),
                          h};
  forward_op.callBoxed(stack);
  return ys;
}

inline torch::autograd::variable_list LowrankLinearFunction::forward(Context* ctx, at::TensorList,
                                                                     const LowrankTensors& t,
                                                                     const LowrankCall& call) {
  const at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor h;
  std::vector<at::Tensor> ys = call.forward(t, h);
  bool trains_downs = false;
  for (const at::Tensor& down : t.downs) trains_downs |= down.requires_grad();
  std::vector<at::Tensor> kept{h, t.rng.value_or(at::Tensor())};
  for (const auto* each : {&t.downs, &t.ups, &t.weights}) {
    kept.insert(kept.end(), each->begin(), each->end());
  }
  kept.push_back(trains_downs ? t.x : at::Tensor());
  ctx->save_for_backward(std::move(kept));
  ctx->saved_data["call"] =
      c10::IValue::make_capsule(c10::intrusive_ptr<LowrankCall>::unsafe_reclaim_from_nonowning(
          const_cast<LowrankCall*>(&call)));
  ctx->saved_data["downs"] = static_cast<int64_t>(t.downs.size());
  ctx->saved_data["weights"] = static_cast<int64_t>(t.weights.size());
  return ys;
}

inline PyObject* LowrankCall::call(PyObject* const* args) {
  LowrankTensors t;
  t.x = tensor_of(args[0]);
  t.downs = THPVariable_Check(args[1]) ? std::vector<at::Tensor>{tensor_of(args[1])}
                                       : tensors_of(args[1]);
  t.ups = tensors_of(args[2]);
  if (args[3] != Py_None) t.weights = tensors_of(args[3]);
  if (args[4] != Py_None) t.biases = items_of<std::optional<at::Tensor>>(args[4], optional_of);
  t.rng = optional_of(args[5]);
  std::vector<at::Tensor> trained{t.x};
  trained.insert(trained.end(), t.downs.begin(), t.downs.end());
  trained.insert(trained.end(), t.ups.begin(), t.ups.end());
  for (const auto& bias : t.biases) {
    if (bias) trained.push_back(*bias);
  }
  bool trains = false;
  for (const at::Tensor& each : trained) trains |= each.requires_grad();
  trains &= c10::GradMode::is_enabled();
  if (trains && is_offered(t.x)) Py_RETURN_NONE;
  std::vector<at::Tensor> ys;
  {
    Unlocked unlocked;
    if (dropout == 0.0) t.rng.reset();
    if (dropout > 0.0) t.rng = t.rng ? t.rng->contiguous() : draw();
    if (trains) {
      ys = LowrankLinearFunction::apply(at::TensorList(trained), t, *this);
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      at::Tensor h;
      ys = forward(t, h);
    }
  }
  THPObjectPtr tuple(PyTuple_New(static_cast<Py_ssize_t>(ys.size())));
  if (!tuple) return nullptr;
  for (size_t k = 0; k < ys.size(); ++k) {
    PyTuple_SET_ITEM(tuple.get(), static_cast<Py_ssize_t>(k), THPVariable_Wrap(ys[k]));
  }
  return tuple.release();
}

// -- backward -------------------------------------------------------------------------------------

// What a node kept, apart, and which gradients are asked of it.
struct LowrankKept {
  at::Tensor h, x;
  std::optional<at::Tensor> rng;
  std::vector<at::Tensor> downs, ups, weights;
  std::vector<bool> needs;  // as `trained` is ordered
  bool needs_downs = false, needs_ups = false;
};

inline LowrankKept kept_by(const torch::autograd::AutogradContext* ctx,
                           const std::vector<at::Tensor>& saved, size_t biases) {
  LowrankKept kept;
  const size_t downs = static_cast<size_t>(ctx->saved_data.at("downs").toInt());
  const size_t weights = static_cast<size_t>(ctx->saved_data.at("weights").toInt());
  const size_t ups = saved.size() - 3 - downs - weights;
  auto at = saved.begin();
  kept.h = *at++;
  if (at->defined()) kept.rng = *at;
  ++at;
  kept.downs.assign(at, at + downs), at += downs;
  kept.ups.assign(at, at + ups), at += ups;
  kept.weights.assign(at, at + weights), at += weights;
  kept.x = *at;
  for (size_t k = 0; k < 1 + downs + ups + biases; ++k) {
    kept.needs.push_back(ctx->needs_input_grad(k));
    if (k > 0 && k <= downs) kept.needs_downs = kept.needs_downs || kept.needs[k];
    if (k > downs && k <= downs + ups) kept.needs_ups = kept.needs_ups || kept.needs[k];
  }
  return kept;
}

inline std::vector<at::Tensor> contiguous_like(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& t : tensors) out.push_back(at::empty(t.sizes(), t.options()));
  return out;
}

// Python's own backward: torch sees what it calls, and its results may be refused.
inline std::vector<at::Tensor> whole_backward(const LowrankCall& call,
                                              const std::vector<at::Tensor>& dys,
                                              const std::vector<at::Tensor>& saved,
                                              const std::vector<bool>& needs) {
  pybind11::gil_scoped_acquire locked;
  const auto node = torch::autograd::get_current_node();
  THPObjectPtr object(torch::autograd::functionToPyObject(node));
  THPObjectPtr grads(THPVariable_WrapList(dys)), kept(THPVariable_WrapList(saved));
  THPObjectPtr wanted(PyList_New(static_cast<Py_ssize_t>(needs.size())));
  if (!object || !grads || !kept || !wanted) throw python_error();
  for (size_t k = 0; k < needs.size(); ++k) {
    PyList_SET_ITEM(wanted.get(), static_cast<Py_ssize_t>(k), PyBool_FromLong(needs[k]));
  }
  THPObjectPtr found(PyObject_CallFunctionObjArgs(call.whole.get(), object.get(), grads.get(),
                                                        kept.get(), wanted.get(), nullptr));
  if (!found) throw python_error();
  return items_of<at::Tensor>(found.get(), [](PyObject* value) {
    return value == Py_None ? at::Tensor() : tensor_of(value);
  });
}

inline torch::autograd::variable_list LowrankLinearFunction::backward(
    Context* ctx, const torch::autograd::variable_list& dys) {
  const auto capsule = ctx->saved_data.at("call").toCapsule();
  const auto& call = static_cast<const LowrankCall&>(*capsule);
  const std::vector<at::Tensor> saved = ctx->get_saved_variables();
  size_t biases = 0;
  for (const bool each : call.has_bias) biases += each;
  const LowrankKept kept = kept_by(ctx, saved, biases);
  bool seen = watched() || c10::GradMode::is_enabled();
  for (const auto* each : {&dys, &saved}) {
    for (const at::Tensor& t : *each) seen = seen || (t.defined() && !plain(t));
  }
  constexpr size_t kOthers = 2;  // arguments of forward that are not trained: no gradient each
  if (seen) {
    torch::autograd::variable_list out = whole_backward(call, dys, saved, kept.needs);
    out.resize(out.size() + kOthers);
    return out;
  }

  const at::AutoDispatchBelowADInplaceOrView below;
  std::vector<at::Tensor> rows;
  for (const at::Tensor& dy : dys) rows.push_back(flat_rows(dy));
  std::optional<at::Tensor> dx, x;
  const bool by_library = call.dx_by_library && !kept.weights.empty();
  if (kept.needs[0]) {
    dx = at::empty({kept.h.size(0), kept.downs[0].size(1)}, kept.h.options());
    for (size_t k = 0; by_library && k < rows.size(); ++k) {
      if (k == 0) at::mm_out(*dx, rows[k], kept.weights[k]);
      if (k > 0) dx->addmm_(rows[k], kept.weights[k]);
    }
  }
  if (kept.needs_downs) x = flat_rows(kept.x);
  std::vector<at::Tensor> ddowns, dups;
  if (kept.needs_downs) ddowns = contiguous_like(kept.downs);
  if (kept.needs_ups) dups = contiguous_like(kept.ups);
  torch::jit::Stack stack{list(rows),
                          x,
                          kept.h,
                          list(kept.downs),
                          list(kept.ups),
                          kept.needs[0] && !by_library ? list(kept.weights) : list({}),
                          c10::IValue(),
                          kept.rng,
                          call.scales,
                          call.dropout,
                          call.site,
                          by_library && kept.needs[0],
                          dx,
                          c10::IValue(),
                          list(ddowns),
                          list(dups),
                          c10::IValue()};
  call.backward_op.callBoxed(stack);

  torch::autograd::variable_list out;
  std::vector<int64_t> shape = dys[0].sizes().vec();
  shape.back() = kept.downs[0].size(1);
  out.push_back(dx ? dx->view(shape) : at::Tensor());
  const auto wanted = [&](const at::Tensor& grad) {
    out.push_back(kept.needs[out.size()] ? grad : at::Tensor());
  };
  for (size_t k = 0; k < kept.downs.size(); ++k) wanted(ddowns.empty() ? at::Tensor() : ddowns[k]);
  for (size_t k = 0; k < kept.ups.size(); ++k) wanted(dups.empty() ? at::Tensor() : dups[k]);
  for (size_t k = 0; k < call.has_bias.size(); ++k) {
    if (call.has_bias[k]) wanted(kept.needs[out.size()] ? rows[k].sum(0) : at::Tensor());
  }
  out.resize(out.size() + kOthers);
  return out;
}

inline PyObject* lowrank_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 8, "lowrank_linear: want 8 arguments, got ", count);
  return wrap(c10::make_intrusive<LowrankCall>(args));
  END_HANDLE_TH_ERRORS
}

}  // namespace petal
