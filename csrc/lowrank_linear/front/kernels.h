// The C++ CPU kernels of lowrank_linear between small tensors, below autograd: what
// petal_kernels/ops/lowrank_linear/native_impl.py does, to the bit.
#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>

#include "common/front/node.h"

namespace petal {

inline c10::OperatorHandle find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

struct LowrankSettings {
  c10::IValue scales;
  double dropout;
  int64_t site;
  bool base_by_library, dx_by_library;
  bool apart;  // x is contracted with one down-projection after the other
  c10::OperatorHandle forward_op, backward_op;

  // (scales, dropout, site, base_by_library, dx_by_library, apart)
  explicit LowrankSettings(PyObject* given)
      : scales(list_of<double>(item(given, 0), float_of)),
        dropout(float_of(item(given, 1))),
        site(int_of(item(given, 2))),
        base_by_library(bool_of(item(given, 3))),
        dx_by_library(bool_of(item(given, 4))),
        apart(bool_of(item(given, 5))),
        forward_op(find_operator("petal_native::lowrank_linear_fwd")),
        backward_op(find_operator("petal_native::lowrank_linear_bwd")) {}

 private:
  static PyObject* item(PyObject* given, Py_ssize_t k) {
    if (!PyTuple_Check(given) || PyTuple_GET_SIZE(given) != 6) wrong("six settings", given);
    return PyTuple_GET_ITEM(given, k);
  }
};

struct LowrankParameters {
  std::vector<at::Tensor> downs, ups, weights;  // [R, D] or K of [R_k, D]; [O_k, R_k]; [O_k, D]
  std::vector<Optional> biases;                 // [O_k]
};

// Writes y_k [N, O_k] into `ys`; gives h [N, sum of R_k].
inline at::Tensor lowrank_forward(const LowrankSettings& s, const at::Tensor& x,
                                  const LowrankParameters& p, const Optional& rng,
                                  const std::vector<at::Tensor>& ys) {
  int64_t middle = 0;
  for (const at::Tensor& down : p.downs) middle += down.size(0);
  for (size_t k = 0; s.base_by_library && k < ys.size(); ++k) {
    at::Tensor y = ys[k];
    at::mm_out(y, x, p.weights[k].t());
  }
  at::Tensor h = at::empty({x.size(0), middle}, x.options());
  const bool joined = !s.apart && p.downs.size() > 1;
  torch::jit::Stack stack{x,
                          joined ? list({at::cat(p.downs)}) : list(p.downs),
                          c10::IValue(),
                          list(p.ups),
                          s.base_by_library ? list({}) : list(p.weights),
                          c10::List<Optional>(p.biases),
                          s.base_by_library ? list(ys) : list({}),
                          c10::IValue(),
                          rng,
                          s.scales,
                          s.dropout,
                          s.site,
                          list(ys),
                          h};
  s.forward_op.callBoxed(stack);
  return h;
}

struct LowrankNeed {
  bool x, downs, hidden, ups;
};

struct LowrankGradients {
  Optional x, hidden;                  // [N, D], [N, sum of R_k]
  std::vector<at::Tensor> downs, ups;  // all or none
};

inline std::vector<at::Tensor> contiguous_like(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& t : tensors) out.push_back(at::empty(t.sizes(), t.options()));
  return out;
}

// x is read for the gradients of the downs alone.
inline LowrankGradients lowrank_backward(const LowrankSettings& s,
                                         const std::vector<at::Tensor>& dys, const at::Tensor& x,
                                         const at::Tensor& h, const LowrankParameters& p,
                                         const Optional& rng, LowrankNeed need) {
  LowrankGradients out;
  const bool by_library = need.x && s.dx_by_library && !p.weights.empty();
  if (need.x) out.x = at::empty({h.size(0), p.downs[0].size(1)}, h.options());
  for (size_t k = 0; by_library && k < dys.size(); ++k) {
    if (k == 0) at::mm_out(*out.x, dys[k], p.weights[k]);
    if (k > 0) out.x->addmm_(dys[k], p.weights[k]);
  }
  if (need.hidden) out.hidden = at::empty(h.sizes(), h.options());
  if (need.downs) out.downs = contiguous_like(p.downs);
  if (need.ups) out.ups = contiguous_like(p.ups);
  torch::jit::Stack stack{list(dys),
                          need.downs ? c10::IValue(x) : c10::IValue(),
                          h,
                          list(p.downs),
                          list(p.ups),
                          need.x && !by_library ? list(p.weights) : list({}),
                          c10::IValue(),
                          rng,
                          s.scales,
                          s.dropout,
                          s.site,
                          by_library,
                          out.x,
                          out.hidden,
                          list(out.downs),
                          list(out.ups),
                          c10::IValue()};
  s.backward_op.callBoxed(stack);
  return out;
}

}  // namespace petal
