// gated_mlp on CUDA: checks, the parameter struct and registration.
// Kernels: {forward,backward}.cu. These functions write into tensors their caller has allocated;
// they are called by ops/gated_mlp/cuda_impl.py only.
#include "common/cuda/host.h"
#include "params.h"

namespace petal {
namespace {

MlpParams mlp_params(const Tensor& g, const MaybeTensor& u, int64_t activation) {
  STD_TORCH_CHECK(g.dim() == 2, "g: want 2 dimensions, got ", g.dim());
  STD_TORCH_CHECK(activation >= 0 && activation <= 4, "activation: want 0 to 4, got ", activation);
  MlpParams p = {};
  p.dtype = dtype_of(g, "g");
  p.activation = static_cast<Activation>(activation);
  p.rows = g.size(0);
  p.width = g.size(1);
  p.g = matrix(g, p.rows, p.width, "g");
  p.u = view(u, p.dtype, p.rows, p.width, "u");
  return p;
}

void gated_mlp_act_fwd(Tensor g, MaybeTensor u, int64_t activation, Tensor out) {
  MlpParams p = mlp_params(g, u, activation);
  p.p = view(out, p.dtype, p.rows, p.width, "p");
  const Device device(g);
  check_launch(launch_gated_mlp_act_fwd(p, device.stream()), "gated_mlp_act_fwd");
}

// dg, over dp, and du where dp is given, ddown = dh^T (mask * p) where dh is.
void gated_mlp_act_bwd(MaybeTensor dp, Tensor g, MaybeTensor u, MaybeTensor dh, MaybeTensor rng,
                       double dropout, int64_t activation, MaybeTensor du, MaybeTensor ddown,
                       int64_t splits) {
  const char* const name = "gated_mlp_act_bwd";
  MlpParams p = mlp_params(g, u, activation);
  STD_TORCH_CHECK(dp.has_value() || dh.has_value(), name, ": want dp or dh, got neither");
  want(du.has_value() == (dp.has_value() && u.has_value()), "du beside dp and u");
  want(ddown.has_value() == dh.has_value(), "ddown beside dh");
  p.dp = view(dp, p.dtype, p.rows, p.width, "dp");
  p.du = view(du, p.dtype, p.rows, p.width, "du");
  const Device device(g);
  Tensor partial;
  if (dh.has_value()) {
    STD_TORCH_CHECK(splits >= 1 && splits <= 65535, name, ": splits: want 1 to 65535, got ",
                    splits);
    STD_TORCH_CHECK(dh->dim() == 2, "dh: want 2 dimensions, got ", dh->dim());
    p.rank = dh->size(1);
    p.dh = view(dh, p.dtype, p.rows, p.rank, "dh");
    p.dropout = dropout_of(rng, dropout);
    p.ddown_dtype = dtype_of(*ddown, "ddown");
    STD_TORCH_CHECK(ddown->is_contiguous(), "ddown: want a contiguous tensor");
    p.ddown = matrix(*ddown, p.rank, p.width, "ddown").data;
    p.splits = splits;
    partial = torch::stable::new_empty(g, {splits, p.width, p.rank}, ScalarType::Float);
    p.partial = static_cast<float*>(partial.data_ptr());
  }
  check_launch(launch_gated_mlp_act_bwd(p, device.stream()), name);
}

}  // namespace
}  // namespace petal

PETAL_LIBRARY_FRAGMENT(PETAL_CUDA_LIBRARY, m) {
  m.def("gated_mlp_act_fwd(Tensor g, Tensor? u, int activation, Tensor(a!) p) -> ()");
  m.def(
      "gated_mlp_act_bwd(Tensor(a!)? dp, Tensor g, Tensor? u, Tensor? dh, Tensor? rng, "
      "float dropout, int activation, Tensor(b!)? du, Tensor(c!)? ddown, int splits) -> ()");
}

PETAL_LIBRARY_IMPL(PETAL_CUDA_LIBRARY, PETAL_CUDA_KEY, m) {
  m.impl("gated_mlp_act_fwd", TORCH_BOX(&petal::gated_mlp_act_fwd));
  m.impl("gated_mlp_act_bwd", TORCH_BOX(&petal::gated_mlp_act_bwd));
}
