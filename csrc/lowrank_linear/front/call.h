// lowrank_linear from Python's call to autograd's node and back, for small calls on the C++ kernels
// without hidden, core or a given base. What is kept, and in which order, is
// petal_kernels/ops/lowrank_linear/function.py's.
#pragma once

#include "lowrank_linear/front/kernels.h"

namespace petal {

struct LowrankCall;

struct LowrankTensors {
  at::Tensor x;  // [..., D]
  LowrankParameters p;
  Optional rng;
};

struct LowrankLinearFunction : torch::autograd::Function<LowrankLinearFunction> {
  // `trained` is x, downs, ups and the biases that are there, in this order.
  static variable_list forward(AutogradContext* ctx, at::TensorList trained,
                               const LowrankTensors& t, const LowrankCall& call);
  static variable_list backward(AutogradContext* ctx, const variable_list& dys);
};

struct LowrankCall final : Prepared {
  LowrankSettings settings;
  size_t downs, ups, weights;
  std::vector<bool> has_bias;
  Held whole;

  explicit LowrankCall(PyObject* const* given)
      : Prepared("lowrank_linear", 6),
        settings(given[0]),
        downs(static_cast<size_t>(int_of(given[1]))),
        ups(static_cast<size_t>(int_of(given[2]))),
        weights(static_cast<size_t>(int_of(given[3]))),
        has_bias(items_of<bool>(given[4], bool_of)),
        whole(given[5]) {}

  PyObject* call(PyObject* const* args) override;

  // Every y [..., O_k], and h [N, R].
  variable_list forward(const LowrankTensors& t, at::Tensor& h) const {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor x = flat_rows(t.x);
    std::vector<int64_t> shape = t.x.sizes().vec();
    variable_list ys, rows;
    for (const at::Tensor& up : t.p.ups) {
      shape.back() = up.size(0);
      ys.push_back(at::empty(shape, x.options()));
      rows.push_back(ys.back().view({x.size(0), shape.back()}));
    }
    h = lowrank_forward(settings, x, t.p, t.rng, rows);
    return ys;
  }
};

inline variable_list LowrankLinearFunction::forward(AutogradContext* ctx, at::TensorList,
                                                    const LowrankTensors& t,
                                                    const LowrankCall& call) {
  at::Tensor h;
  variable_list ys = call.forward(t, h);
  variable_list kept{h, t.rng.value_or(at::Tensor())};
  append(kept, t.p.downs);
  append(kept, t.p.ups);
  append(kept, t.p.weights);
  kept.push_back(any_trained(t.p.downs) ? t.x : at::Tensor());
  ctx->save_for_backward(std::move(kept));
  keep_call(ctx, call);
  return ys;
}

inline PyObject* LowrankCall::call(PyObject* const* args) {
  LowrankTensors t;
  t.x = tensor_of(args[0]);
  if (THPVariable_Check(args[1])) {
    t.p.downs = {tensor_of(args[1])};
  } else {
    t.p.downs = tensors_of(args[1]);
  }
  t.p.ups = tensors_of(args[2]);
  if (args[3] != Py_None) t.p.weights = tensors_of(args[3]);
  if (args[4] != Py_None) t.p.biases = items_of<Optional>(args[4], optional_of);
  t.rng = optional_of(args[5]);
  variable_list trained{t.x};
  append(trained, t.p.downs);
  append(trained, t.p.ups);
  append(trained, t.p.biases);
  const bool recorded = trains(trained);
  if (recorded && is_offered(t.x)) Py_RETURN_NONE;
  variable_list ys;
  {
    Unlocked unlocked;
    t.rng = mask_state(t.rng, settings.dropout);
    at::Tensor h;
    ys = recorded ? LowrankLinearFunction::apply(at::TensorList(trained), t, *this) : forward(t, h);
  }
  return tuple_of(ys);
}

inline variable_list LowrankLinearFunction::backward(AutogradContext* ctx,
                                                     const variable_list& dys) {
  const auto call = call_of<LowrankCall>(ctx);
  const variable_list saved = ctx->get_saved_variables();
  const size_t ups = 1 + call->downs, biases = ups + call->ups;
  size_t count = biases;
  for (const bool each : call->has_bias) count += each;
  const Needs needs(ctx, count);
  constexpr size_t kOthers = 2;
  if (is_seen({&dys, &saved})) {
    return results(whole_backward(call->whole, dys, saved, needs), kOthers);
  }

  const at::AutoDispatchBelowADInplaceOrView below;
  LowrankParameters p;
  auto at = saved.begin() + 2;
  p.downs.assign(at, at + call->downs), at += call->downs;
  p.ups.assign(at, at + call->ups), at += call->ups;
  p.weights.assign(at, at + call->weights), at += call->weights;
  const LowrankNeed need{needs[0], needs.any(1, ups), false, needs.any(ups, biases)};
  const Optional rng = saved[1].defined() ? Optional(saved[1]) : std::nullopt;
  variable_list rows;
  for (const at::Tensor& dy : dys) rows.push_back(flat_rows(dy));
  const at::Tensor x = need.downs ? flat_rows(*at) : at::Tensor();
  LowrankGradients found = lowrank_backward(call->settings, rows, x, saved[0], p, rng, need);

  variable_list out(count);
  if (found.x) {
    std::vector<int64_t> shape = dys[0].sizes().vec();
    shape.back() = found.x->size(1);
    out[0] = found.x->view(shape);
  }
  for (size_t k = 1; k < ups; ++k) {
    if (needs[k]) out[k] = found.downs[k - 1];
  }
  for (size_t k = ups; k < biases; ++k) {
    if (needs[k]) out[k] = found.ups[k - ups];
  }
  for (size_t k = 0, next = biases; k < call->has_bias.size(); ++k) {
    if (!call->has_bias[k]) continue;
    if (needs[next]) out[next] = rows[k].sum(0);
    ++next;
  }
  return results(std::move(out), kOthers);
}

inline PyObject* lowrank_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "lowrank_linear: want 6 arguments, got ", count);
  return wrap(c10::make_intrusive<LowrankCall>(args));
  END_HANDLE_TH_ERRORS
}

}  // namespace petal
