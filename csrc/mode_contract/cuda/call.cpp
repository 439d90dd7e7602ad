// mode_contract on CUDA: checks, parameter structs and registration.
// Kernels: {forward,backward}.cu. These functions write into tensors their caller has allocated;
// they are called by ops/mode_contract/cuda_impl.py only.
#include "common/cuda/host.h"
#include "params.h"

namespace petal {
namespace {

void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": want a contiguous tensor");
}

// A contiguous tensor seen as rows of `cols` elements.
MatrixView rows_of(const Tensor& tensor, int64_t cols, const char* name) {
  check_contiguous(tensor, name);
  MatrixView view;
  view.data = tensor.data_ptr();
  view.stride = cols;
  view.vec = can_vectorise(view.data, cols, static_cast<int64_t>(tensor.element_size()));
  return view;
}

ModeParams mode_params(const Tensor& core, const Tensor& modes, const MaybeTensor& up, double scale,
                       const char* name) {
  STD_TORCH_CHECK(core.dim() == 1 || core.dim() == 3, name, ": core: want [R] or [R, R, R], got ",
                  core.dim(), " dimensions");
  STD_TORCH_CHECK(modes.dim() == 2, name, ": modes: want 2 dimensions, got ", modes.dim());
  ModeParams p = {};
  p.dtype = dtype_of(core, name);
  p.modes_count = modes.size(0);
  p.rank = modes.size(1);
  for (int64_t dim = 0; dim < core.dim(); ++dim)
    STD_TORCH_CHECK(core.size(dim) == p.rank, name, ": core: want every size ", p.rank);
  STD_TORCH_CHECK(modes.scalar_type() == core.scalar_type(), name,
                  ": modes: want the dtype of core");
  p.core = rows_of(core, p.rank, "core");
  p.modes = rows_of(modes, p.rank, "modes");
  p.columns = p.rank;
  if (up.has_value()) {
    STD_TORCH_CHECK(up->dim() == 2 && up->size(1) == p.rank, name, ": up: want [O, ", p.rank, "]");
    STD_TORCH_CHECK(up->scalar_type() == core.scalar_type(), name, ": up: want the dtype of core");
    p.columns = up->size(0);
    p.up = rows_of(*up, p.rank, "up");
  }
  p.scale = static_cast<float>(scale);
  return p;
}

// out = PT [K, R, O], or scale * M [K, R, R] without up.
void mode_contract_fwd(Tensor core, Tensor modes, MaybeTensor up, Tensor out, double scale) {
  ModeParams p = mode_params(core, modes, up, scale, "mode_contract_fwd");
  STD_TORCH_CHECK(out.dim() == 3 && out.size(0) == p.modes_count && out.size(1) == p.rank &&
                      out.size(2) == p.columns,
                  "mode_contract_fwd: out: want [K, R, O]");
  p.out_dtype = dtype_of(out, "mode_contract_fwd: out");
  const MatrixView view = rows_of(out, p.columns, "out");
  p.out = view.data;
  p.out_vec = view.vec;
  const Device device(core);
  const char* const error = core.dim() == 3 ? launch_mode_contract_fwd(p, device.stream())
                                            : launch_mode_diagonal_fwd(p, device.stream());
  check_launch(error, "mode_contract_fwd");
}

// Gradients from dout [K, R, O], of the inputs' dtype like every gradient; those not given are not
// computed.
void mode_contract_bwd(Tensor dout, Tensor core, Tensor modes, MaybeTensor up, MaybeTensor dcore,
                       MaybeTensor dmodes, MaybeTensor dup, double scale) {
  ModeParams p = mode_params(core, modes, up, scale, "mode_contract_bwd");
  STD_TORCH_CHECK(dout.dim() == 3 && dout.size(0) == p.modes_count && dout.size(1) == p.rank &&
                      dout.size(2) == p.columns,
                  "mode_contract_bwd: dout: want [K, R, O]");
  STD_TORCH_CHECK(core.dim() == 1 || up.has_value(),
                  "mode_contract_bwd: up: want a tensor next to a core of 3 dimensions");
  STD_TORCH_CHECK(!dup.has_value() || up.has_value(), "mode_contract_bwd: dup without up");
  p.dout = rows_of(dout, p.columns, "dout");
  const std::pair<const MaybeTensor*, const Tensor*> gradients[] = {
      {&dcore, &core}, {&dmodes, &modes}, {&dup, up.has_value() ? &*up : nullptr}};
  for (const auto& [gradient, of] : gradients) {
    if (!gradient->has_value()) continue;
    STD_TORCH_CHECK((*gradient)->numel() == of->numel(),
                    "mode_contract_bwd: a gradient has another size than its tensor");
    STD_TORCH_CHECK((*gradient)->scalar_type() == core.scalar_type(),
                    "mode_contract_bwd: a gradient has another dtype than core");
    check_contiguous(**gradient, "mode_contract_bwd: gradient");
  }
  STD_TORCH_CHECK(dout.scalar_type() == core.scalar_type(),
                  "mode_contract_bwd: dout: want the dtype of core");
  const Device device(core);
  p.dcore = dcore.has_value() ? dcore->data_ptr() : nullptr;
  p.dmodes = dmodes.has_value() ? dmodes->data_ptr() : nullptr;
  p.dup = dup.has_value() ? dup->data_ptr() : nullptr;
  p.dcore_vec = p.core.vec && can_vectorise(p.dcore, 0, 1);
  if (core.dim() == 1) {
    STD_TORCH_CHECK(p.modes_count <= kMaxDiagonalModes, "mode_contract_bwd: want at most ",
                    kMaxDiagonalModes, " modes, got ", p.modes_count);
    check_launch(launch_mode_diagonal_bwd(p, device.stream()), "mode_contract_bwd");
    return;
  }
  Tensor modes_partial, up_partial;
  if (p.dmodes != nullptr) {
    modes_partial =
        torch::stable::new_empty(core, {p.rank, p.modes_count, p.rank}, ScalarType::Float);
    p.modes_partial = static_cast<float*>(modes_partial.data_ptr());
  }
  if (p.dup != nullptr) {
    p.up_splits = mode_up_splits(p.rank, p.columns, p.dtype);
    up_partial =
        torch::stable::new_empty(core, {p.up_splits, p.columns, p.rank}, ScalarType::Float);
    p.up_partial = static_cast<float*>(up_partial.data_ptr());
  }
  check_launch(launch_mode_contract_bwd(p, device.stream()), "mode_contract_bwd");
}

}  // namespace
}  // namespace petal

PETAL_LIBRARY_FRAGMENT(PETAL_CUDA_LIBRARY, m) {
  m.def(
      "mode_contract_fwd(Tensor core, Tensor modes, Tensor? up, Tensor(a!) out, float scale) -> "
      "()");
  m.def(
      "mode_contract_bwd(Tensor dout, Tensor core, Tensor modes, Tensor? up, Tensor(a!)? dcore, "
      "Tensor(b!)? dmodes, Tensor(c!)? dup, float scale) "
      "-> ()");
}

PETAL_LIBRARY_IMPL(PETAL_CUDA_LIBRARY, PETAL_CUDA_KEY, m) {
  m.impl("mode_contract_fwd", TORCH_BOX(&petal::mode_contract_fwd));
  m.impl("mode_contract_bwd", TORCH_BOX(&petal::mode_contract_bwd));
}
