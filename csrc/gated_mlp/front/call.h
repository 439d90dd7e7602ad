// gated_mlp from Python's call to autograd's node and back, for small calls on the C++ kernels whose
// linears all have an update and whose outputs are kept. What is computed and kept, and in which
// order, is petal_kernels/ops/gated_mlp/function.py's.
#pragma once

#include "lowrank_linear/front/kernels.h"

namespace petal {

struct GatedMlpCall;

// Of gate (if there is one), up and down, in this order.
struct GatedMlpTensors {
  at::Tensor x;  // [..., D]
  LowrankParameters inner, last;
  Optional rng;
};

struct GatedMlpFunction : torch::autograd::Function<GatedMlpFunction> {
  // `trained` is x, downs, ups and the biases that are there, in this order.
  static variable_list forward(AutogradContext* ctx, at::TensorList trained,
                               const GatedMlpTensors& t, const GatedMlpCall& call);
  static variable_list backward(AutogradContext* ctx, const variable_list& dys);
};

struct GatedMlpCall final : Prepared {
  LowrankSettings inner, last;
  int64_t activation;
  std::vector<bool> has_bias;
  Held whole;
  c10::OperatorHandle forward_op, backward_op;

  explicit GatedMlpCall(PyObject* const* given)
      : Prepared("gated_mlp", 6),
        inner(given[0]),
        last(given[1]),
        activation(int_of(given[2])),
        has_bias(items_of<bool>(given[3], bool_of)),
        whole(given[4]),
        forward_op(find_operator("petal_native::gated_mlp_act_fwd")),
        backward_op(find_operator("petal_native::gated_mlp_act_bwd")) {}

  size_t linears() const { return has_bias.size(); }

  // The state of the last linear's mask: its stream comes after the others'.
  Optional behind(const Optional& rng) const {
    if (!rng) return rng;
    at::Tensor state = rng->clone();
    state.mutable_data_ptr<int64_t>()[1] += static_cast<int64_t>(linears() - 1);
    return state;
  }

  struct Kept {
    variable_list inner;  // g and u [N, F]; or what the activation reads
    at::Tensor h, middle;
  };

  at::Tensor forward(const GatedMlpTensors& t, Kept& kept) const {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor x = flat_rows(t.x);
    const int64_t rows = x.size(0);
    for (const at::Tensor& up : t.inner.ups) {
      kept.inner.push_back(at::empty({rows, up.size(0)}, x.options()));
    }
    kept.h = lowrank_forward(inner, x, t.inner, t.rng, kept.inner);
    const Optional u = kept.inner.size() > 1 ? Optional(kept.inner[1]) : std::nullopt;
    const at::Tensor p = at::empty_like(kept.inner[0]);
    torch::jit::Stack stack{kept.inner[0], u, activation, p};
    forward_op.callBoxed(stack);
    std::vector<int64_t> shape = t.x.sizes().vec();
    shape.back() = t.last.ups[0].size(0);
    at::Tensor y = at::empty(shape, x.options());
    kept.middle = lowrank_forward(last, p, t.last, behind(t.rng), {y.view({rows, shape.back()})});
    return y;
  }

  PyObject* call(PyObject* const* args) override;
};

inline variable_list GatedMlpFunction::forward(AutogradContext* ctx, at::TensorList,
                                               const GatedMlpTensors& t, const GatedMlpCall& call) {
  GatedMlpCall::Kept kept;
  at::Tensor y = call.forward(t, kept);
  variable_list before{t.x};
  append(before, t.inner.downs);
  append(before, t.inner.ups);
  append(before, t.inner.biases);
  const bool between = any_trained(before) || any_trained(t.last.downs);
  variable_list saved{between ? kept.h : at::Tensor(), kept.middle, t.rng.value_or(at::Tensor())};
  if (!between) kept.inner.assign(kept.inner.size(), at::Tensor());
  append(saved, kept.inner);
  for (const auto* p : {&t.inner, &t.last}) append(saved, p->weights);
  for (const auto* p : {&t.inner, &t.last}) append(saved, p->downs);
  for (const auto* p : {&t.inner, &t.last}) append(saved, p->ups);
  saved.push_back(any_trained(t.inner.downs) ? t.x : at::Tensor());
  ctx->save_for_backward(std::move(saved));
  keep_call(ctx, call);
  return {y};
}

// Everything but the last entry, and the last.
template <typename T>
void divide(const std::vector<T>& all, std::vector<T>& inner, std::vector<T>& last) {
  inner.assign(all.begin(), all.end() - 1);
  last.assign(all.end() - 1, all.end());
}

inline PyObject* GatedMlpCall::call(PyObject* const* args) {
  GatedMlpTensors t;
  t.x = tensor_of(args[0]);
  const variable_list downs = tensors_of(args[3]), ups = tensors_of(args[4]);
  divide(tensors_of(args[1]), t.inner.weights, t.last.weights);
  std::vector<Optional> biases(linears());
  if (args[2] != Py_None) biases = items_of<Optional>(args[2], optional_of);
  divide(biases, t.inner.biases, t.last.biases);
  divide(downs, t.inner.downs, t.last.downs);
  divide(ups, t.inner.ups, t.last.ups);
  t.rng = optional_of(args[5]);
  variable_list trained{t.x};
  append(trained, downs);
  append(trained, ups);
  append(trained, biases);
  const bool recorded = trains(trained);
  if (recorded && is_offered(t.x)) Py_RETURN_NONE;
  at::Tensor y;
  {
    Unlocked unlocked;
    t.rng = mask_state(t.rng, inner.dropout);
    Kept kept;
    y = recorded ? GatedMlpFunction::apply(at::TensorList(trained), t, *this)[0] : forward(t, kept);
  }
  return THPVariable_Wrap(y);
}

// -- backward -------------------------------------------------------------------------------------

// What a node kept, apart.
struct GatedMlpKept {
  at::Tensor h, middle, x;
  Optional rng;
  variable_list inner;
  LowrankParameters before, last;

  GatedMlpKept(const variable_list& saved, size_t linears)
      : h(saved[0]), middle(saved[1]), x(saved.back()) {
    if (saved[2].defined()) rng = saved[2];
    auto at = saved.begin() + 3;
    inner.assign(at, at + linears - 1), at += linears - 1;
    for (auto part :
         {&LowrankParameters::weights, &LowrankParameters::downs, &LowrankParameters::ups}) {
      divide(variable_list(at, at + linears), before.*part, last.*part);
      at += linears;
    }
  }
};

// Where the gradient of each trained tensor lies, and which of them are asked for.
struct GatedMlpNeeds {
  size_t n, ups, biases, count;
  std::vector<size_t> bias_at;  // of each linear; 0: it has none
  Needs needs;

  GatedMlpNeeds(AutogradContext* ctx, const std::vector<bool>& has_bias)
      : n(has_bias.size()),
        ups(1 + n),
        biases(ups + n),
        count(biases),
        bias_at(places(has_bias, count)),
        needs(ctx, count) {}

  bool bias(size_t k) const { return bias_at[k] > 0 && needs[bias_at[k]]; }
  LowrankNeed inner() const {
    return {needs[0], needs.any(1, ups - 1), false, needs.any(ups, biases - 1)};
  }
  bool last_down() const { return needs[ups - 1]; }
  bool last_up() const { return needs[biases - 1]; }
  // Whether a gradient has to pass p.
  bool through() const {
    const LowrankNeed before = inner();
    bool any = before.x || before.downs || before.ups;
    for (size_t k = 0; k + 1 < n; ++k) any = any || bias(k);
    return any;
  }

 private:
  static std::vector<size_t> places(const std::vector<bool>& has_bias, size_t& count) {
    std::vector<size_t> at(has_bias.size(), 0);
    for (size_t k = 0; k < at.size(); ++k) {
      if (has_bias[k]) at[k] = count++;
    }
    return at;
  }
};

// The last linear, which needs no p, then what lies between: dg and du, or nothing.
inline variable_list gated_mlp_last(const GatedMlpCall& call, const GatedMlpKept& kept,
                                    const GatedMlpNeeds& n, const at::Tensor& dy,
                                    variable_list& out) {
  const Optional behind = call.behind(kept.rng);
  const bool through = n.through(), trained = n.last_down();
  const LowrankNeed need{through, false, trained, n.last_up()};
  LowrankGradients end;
  if (through || trained || need.ups) {
    end = lowrank_backward(call.last, {dy}, at::Tensor(), kept.middle, kept.last, behind, need);
  }
  if (need.ups) out[n.biases - 1] = end.ups[0];
  if (n.bias(n.n - 1)) out[n.bias_at[n.n - 1]] = dy.sum(0);
  if (!through && !trained) return {};
  const at::Tensor& g = kept.inner[0];
  const Optional u = n.n > 2 ? Optional(kept.inner[1]) : std::nullopt;
  const Optional du = through && u ? Optional(at::empty_like(g)) : std::nullopt;
  Optional ddown;
  if (trained) ddown = contiguous_like(kept.last.downs)[0];
  torch::jit::Stack stack{end.x,
                          g,
                          u,
                          end.hidden,
                          trained ? behind : std::nullopt,
                          trained ? call.last.dropout : 0.0,
                          call.activation,
                          du,
                          ddown};
  call.backward_op.callBoxed(stack);  // dp becomes dg
  if (trained) out[n.ups - 1] = *ddown;
  if (!through) return {};
  return du ? variable_list{*end.x, *du} : variable_list{*end.x};
}

inline variable_list GatedMlpFunction::backward(AutogradContext* ctx, const variable_list& dys) {
  const auto call = call_of<GatedMlpCall>(ctx);
  const variable_list saved = ctx->get_saved_variables();
  const GatedMlpNeeds n(ctx, call->has_bias);
  constexpr size_t kOthers = 2;
  if (is_seen({&dys, &saved})) {
    return results(whole_backward(call->whole, dys, saved, n.needs), kOthers);
  }

  const at::AutoDispatchBelowADInplaceOrView below;
  const GatedMlpKept kept(saved, n.n);
  variable_list out(n.count);
  const variable_list inner = gated_mlp_last(*call, kept, n, flat_rows(dys[0]), out);
  if (inner.empty()) return results(std::move(out), kOthers);
  const LowrankNeed need = n.inner();
  const at::Tensor x = need.downs ? flat_rows(kept.x) : at::Tensor();
  LowrankGradients begin;
  if (need.x || need.downs || need.ups) {
    begin = lowrank_backward(call->inner, inner, x, kept.h, kept.before, kept.rng, need);
  }
  if (need.x) {
    std::vector<int64_t> shape = dys[0].sizes().vec();
    shape.back() = begin.x->size(1);
    out[0] = begin.x->view(shape);
  }
  for (size_t k = 0; k + 1 < n.n; ++k) {
    if (n.needs[1 + k]) out[1 + k] = begin.downs[k];
    if (n.needs[n.ups + k]) out[n.ups + k] = begin.ups[k];
    if (n.bias(k)) out[n.bias_at[k]] = inner[k].sum(0);
  }
  return results(std::move(out), kOthers);
}

inline PyObject* gated_mlp(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5, "gated_mlp: want 5 arguments, got ", count);
  return wrap(c10::make_intrusive<GatedMlpCall>(args));
  END_HANDLE_TH_ERRORS
}

}  // namespace petal
