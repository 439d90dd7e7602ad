// frozen_norm on CUDA: checks, parameter structs and registration. Kernels: {forward,backward}.cu.
// These functions write into tensors their caller has allocated; they are called by
// ops/frozen_norm/cuda_impl.py only.
#include "common/cuda/host.h"
#include "params.h"

namespace petal {
namespace {

// The kinds by their numbers in ops/frozen_norm/arguments.py.
enum Kind : int64_t { kLayer = 0, kRms = 1, kRmsOnce = 2, kRmsPlusOne = 3 };

MatrixView vector(const NormParams& p, const MaybeTensor& t, const char* name) {
  if (!t.has_value()) return {};
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == p.width && t->is_contiguous(), name, ": want [",
                  p.width, "], contiguous");
  STD_TORCH_CHECK(dtype_of(*t, name) == p.dtype, name, ": want x's dtype");
  MatrixView view;
  view.data = t->data_ptr();
  view.vec = can_vectorise(view.data, 0, 1);
  return view;
}

NormParams norm_params(const Tensor& x, const Tensor& moments, const MaybeTensor& weight,
                       int64_t kind) {
  STD_TORCH_CHECK(x.dim() == 2, "x: want 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(kind >= kLayer && kind <= kRmsPlusOne, "kind: want 0 .. 3, got ", kind);
  NormParams p = {};
  p.dtype = dtype_of(x, "x");
  p.rows = x.size(0), p.width = x.size(1);
  p.centered = kind == kLayer, p.rounded = kind == kRms, p.offset = kind == kRmsPlusOne;
  p.x = matrix(x, p.rows, p.width, "x");
  p.weight = vector(p, weight, "weight");
  p.moments = floats(moments, p.rows * (p.centered ? 2 : 1), "moments");
  return p;
}

void frozen_norm_fwd(Tensor x, MaybeTensor weight, MaybeTensor bias, int64_t kind, double eps,
                     Tensor y, Tensor moments) {
  NormParams p = norm_params(x, moments, weight, kind);
  p.eps = static_cast<float>(eps);
  p.bias = vector(p, bias, "bias");
  p.y = view(y, p.dtype, p.rows, p.width, "y");
  const Device device(x);
  check_launch(launch_frozen_norm_fwd(p, device.stream()), "frozen_norm_fwd");
}

void frozen_norm_bwd(Tensor dy, Tensor x, Tensor moments, MaybeTensor weight, int64_t kind,
                     Tensor dx) {
  NormParams p = norm_params(x, moments, weight, kind);
  p.dy = view(dy, p.dtype, p.rows, p.width, "dy");
  p.dx = view(dx, p.dtype, p.rows, p.width, "dx");
  const Device device(x);
  check_launch(launch_frozen_norm_bwd(p, device.stream()), "frozen_norm_bwd");
}

}  // namespace
}  // namespace petal

PETAL_LIBRARY_FRAGMENT(PETAL_CUDA_LIBRARY, m) {
  m.def(
      "frozen_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, int kind, float eps, Tensor(a!) y, "
      "Tensor(b!) moments) -> ()");
  m.def(
      "frozen_norm_bwd(Tensor dy, Tensor x, Tensor moments, Tensor? weight, int kind, "
      "Tensor(a!) dx) -> ()");
}

PETAL_LIBRARY_IMPL(PETAL_CUDA_LIBRARY, PETAL_CUDA_KEY, m) {
  m.impl("frozen_norm_fwd", TORCH_BOX(&petal::frozen_norm_fwd));
  m.impl("frozen_norm_bwd", TORCH_BOX(&petal::frozen_norm_bwd));
}
