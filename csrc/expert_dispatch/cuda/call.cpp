// expert_dispatch on CUDA: checks, parameter structs and registration.
// Kernels: {sort,forward,backward,weights}.cu. These functions write into tensors their caller has
// allocated; they are called by ops/expert_dispatch/cuda_impl.py only.
#include "call.h"

namespace petal {
namespace {

// Logits and choice, z, and the output where `work` has room for it.
void expert_dispatch_fwd(MaybeTensors tensors, MaybeTensors work, std::vector<int64_t> codes,
                         std::vector<double> numbers, bool form_logits, bool form_z, bool by_slot) {
  const Call call{tensors, work, expert_settings(codes, numbers)};
  STD_TORCH_CHECK(tensors.size() == Input::kCount, "expert_dispatch: a list of another length");
  want(tensors[Input::kX].has_value(), "x");
  const Tensor& x = *tensors[Input::kX];
  ExpertFwdParams p = {};
  p.f = params_of(call, dtype_of(x, "x"), x.size(0));
  ExpertParams& f = p.f;
  f.down =
      view(tensors[Input::kDown], f.dtype, (f.shared ? 1 : f.experts) * f.rank, f.width, "down");
  f.down_bias =
      vector(tensors[Input::kDownBias], f.dtype, (f.shared ? 1 : f.experts) * f.rank, "down_bias");
  p.form_logits = form_logits;
  p.form_z = form_z;
  p.by_slot = by_slot;
  want(!form_logits || f.router.data != nullptr, "router");
  want(!by_slot || f.order != nullptr, "order");
  if (work[kOut].has_value() && !by_slot) {
    p.out = view(work[kOut], f.dtype, f.rows, f.outs, "out");
    p.h = view(tensors[call.settings.add_input ? Input::kX : Input::kBase], f.dtype, f.rows, f.outs,
               "base");
  }
  want(f.z.data != nullptr || (!form_z && p.out.data == nullptr), "z");
  const Device device(x);
  check_launch(launch_expert_dispatch_fwd(p, device.stream()), "expert_dispatch_fwd");
}

// dz, ga and dgates, then what follows by token: dlogits in dgates' place, the gates, dx.
void expert_dispatch_bwd_rows(Tensor dout, MaybeTensors tensors, MaybeTensors work,
                              std::vector<int64_t> codes, std::vector<double> numbers, bool form_dz,
                              bool form_dx, bool by_slot) {
  const Call call{tensors, work, expert_settings(codes, numbers)};
  ExpertRowsParams p = {};
  p.f = params_of(call, dtype_of(dout, "dout"), dout.size(0));
  ExpertParams& f = p.f;
  const int64_t experts = f.experts, inner = experts * f.rank;
  const bool sorted = f.order != nullptr;
  const int64_t side_rows = sorted ? f.slots : f.rows, side_cols = sorted ? f.rank : inner;
  f.down = view(tensors[Input::kDown], f.dtype, inner, f.width, "down");
  p.dout = matrix(dout, f.rows, f.outs, "dout");
  p.dz = view(work[kDz], f.dtype, side_rows, side_cols, "dz");
  p.ga = view(work[kGa], f.dtype, side_rows, side_cols, "ga");
  p.dx = view(work[kDx], f.dtype, f.rows, f.width, "dx");
  p.dgates = floats(work[kDgates], f.rows * experts, "dgates");
  p.gates = floats(work[kGates], f.rows * experts, "gates");
  p.dlogits = floats(work[kDlogits], f.rows * experts, "dlogits");
  p.form_dz = form_dz;
  p.form_dx = form_dx;
  p.by_slot = by_slot;
  p.adds_dout = call.settings.add_input;
  STD_TORCH_CHECK(!p.adds_dout || f.outs == f.width, "dx: want the width of dout, got ", f.width);
  want(!form_dz || f.z.data != nullptr, "z");
  want(p.dx.data == nullptr || p.dz.data != nullptr, "dz");
  want(!by_slot || sorted, "order");
  want(f.logits == nullptr || p.dx.data == nullptr || f.router.data != nullptr, "router");
  const Device device(dout);
  check_launch(launch_expert_dispatch_bwd_rows(p, device.stream()), "expert_dispatch_bwd_rows");
}

ExpertSortParams sort_params(const Tensor& order, const Tensor& offsets, const Tensor& inverse) {
  STD_TORCH_CHECK(inverse.dim() == 2, "inverse: want 2 dimensions, got ", inverse.dim());
  ExpertSortParams p = {};
  p.rows = inverse.size(0);
  p.experts = static_cast<int32_t>(inverse.size(1));
  STD_TORCH_CHECK(p.experts >= 1 && p.experts <= kMaxExperts, "experts: want 1 to ", kMaxExperts,
                  ", got ", p.experts);
  p.slots = order.numel();
  p.order = ints(order, p.slots, "order");
  p.offsets = ints(offsets, p.experts + 1, "offsets");
  p.inverse = ints(inverse, inverse.numel(), "inverse");
  p.tokens_per_gate = 1;
  return p;
}

void expert_dispatch_fwd_sort(Tensor chosen, Tensor order, Tensor offsets, Tensor inverse) {
  ExpertSortParams p = sort_params(order, offsets, inverse);
  STD_TORCH_CHECK(chosen.dim() == 2 && chosen.size(1) == p.experts && chosen.size(0) > 0 &&
                      p.rows % chosen.size(0) == 0,
                  "chosen: want [N or samples, ", p.experts, "] for ", p.rows, " tokens");
  p.chosen = elements<uint8_t>(chosen, ScalarType::Bool, chosen.numel(), "chosen");
  p.tokens_per_gate = p.rows / chosen.size(0);
  Tensor counts =
      torch::stable::new_empty(order, {ceil_div(p.rows, kSortTokens) * p.experts}, ScalarType::Int);
  p.counts = static_cast<int32_t*>(counts.data_ptr());
  const Device device(order);
  check_launch(launch_expert_dispatch_fwd_sort(p, device.stream()), "expert_dispatch_fwd_sort");
}

void expert_dispatch_bwd_invert(Tensor order, Tensor offsets, Tensor inverse) {
  const ExpertSortParams p = sort_params(order, offsets, inverse);
  const Device device(order);
  check_launch(launch_expert_dispatch_bwd_invert(p, device.stream()), "expert_dispatch_bwd_invert");
}

// The gradients of the weights, in the order of `grads`: products, then sums over rows.
enum WeightGradient {
  kGradUp,    // of dout and ga
  kGradDown,  // of x and dz
  kProducts,
  kGradUpBias = kProducts,  // of dout and the gates
  kGradRouter,              // of x and the logits' gradient
  kGradDownBias,            // sorted: of dz
  kGradients
};
static_assert(kGradients == kMaxExpertReduces);

// What the products and sums read; their partials lie behind each other in one tensor.
struct Weights {
  DType dtype;
  int64_t rows, experts, rank;
  const int32_t *order, *offsets;
  MatrixView dout, x, dz, ga;
  const float* factors[kMaxExpertSums];
  int64_t widths[kMaxExpertReduces];
  int64_t first[kMaxExpertReduces + 1];  // each starts on 16 bytes
  float* partial;
};

Weights weights_of(const Tensor& dout, const MaybeTensor& x, const MaybeTensors& work,
                   const MaybeTensors& grads, int64_t experts, int64_t rank, int64_t splits) {
  Weights p = {};
  p.dtype = dtype_of(dout, "dout");
  p.rows = dout.size(0), p.experts = experts, p.rank = rank;
  const int64_t outs = dout.size(1);
  if (work[kOrder].has_value()) {
    p.order = ints(work[kOrder], work[kOrder]->numel(), "order");
    p.offsets = ints(work[kOffsets], experts + 1, "offsets");
    want(p.offsets != nullptr, "offsets");
  }
  const bool sorted = p.order != nullptr;
  const int64_t side_rows = sorted ? work[kOrder]->numel() : p.rows,
                side_cols = sorted ? rank : experts * rank;
  p.dout = matrix(dout, p.rows, outs, "dout");
  int64_t width = 0;
  if (grads[kGradDown].has_value() || grads[kGradRouter].has_value()) {
    want(x.has_value() && x->dim() == 2, "x");
    width = x->size(1);
    p.x = view(x, p.dtype, p.rows, width, "x");
  }
  p.dz = view(work[kDz], p.dtype, side_rows, side_cols, "dz");
  p.ga = view(work[kGa], p.dtype, side_rows, side_cols, "ga");
  p.factors[0] = floats(work[kGates], p.rows * experts, "gates");
  p.factors[1] = floats(work[kDgates], p.rows * experts, "dgates");
  const int64_t widths[] = {outs, width, outs, width, rank};
  for (int j = 0; j < kMaxExpertReduces; ++j) {
    const int64_t each = widths[j] * (j < kProducts ? rank : 1);
    p.widths[j] = widths[j];
    p.first[j + 1] =
        p.first[j] + (grads[j].has_value() ? ceil_div(splits * experts * each, 4) * 4 : 0);
  }
  return p;
}

ExpertWeightsParams products_of(const Weights& w, const MaybeTensors& grads, int64_t splits) {
  ExpertWeightsParams p = {};
  p.dtype = w.dtype;
  p.rows = w.rows;
  p.experts = static_cast<int32_t>(w.experts);
  p.rank = static_cast<int32_t>(w.rank);
  p.order = w.order;
  p.offsets = w.offsets;
  p.splits = splits;
  const MatrixView inputs[] = {w.dout, w.x}, sides[] = {w.ga, w.dz};
  for (int j = 0; j < kProducts; ++j) {
    if (!grads[j].has_value()) continue;
    want(sides[j].data != nullptr, j == kGradUp ? "ga" : "dz");
    p.product[j] = {inputs[j], sides[j], w.widths[j], w.partial + w.first[j]};
  }
  return p;
}

ExpertSumsParams sums_of(const Weights& w, const MaybeTensors& grads, int64_t splits) {
  ExpertSumsParams p = {};
  p.rows = w.rows;
  p.experts = static_cast<int32_t>(w.experts);
  p.offsets = w.offsets;
  p.splits = splits;
  const MatrixView inputs[] = {w.dout, w.x, w.dz};
  for (int j = 0; j < kMaxExpertSums; ++j) {
    const int grad = kProducts + j;
    if (!grads[grad].has_value()) continue;
    const bool formed = grad == kGradDownBias ? w.order != nullptr : w.factors[j] != nullptr;
    want(inputs[j].data != nullptr && formed, "what a sum is formed of");
    p.job[p.jobs++] = {inputs[j], w.dtype, w.widths[grad], w.factors[j], w.partial + w.first[grad]};
  }
  return p;
}

// Where the sum of a gradient's partials goes.
ExpertReduce reduce_of(const Tensor& grad, int j, const Weights& w, double mix, int64_t splits) {
  const bool product = j < kProducts, down = j == kGradDown || j == kGradDownBias;
  // One down-projection for all: the experts are added like splits.
  const bool add = down && grad.size(0) != w.experts;
  ExpertReduce job = {};
  job.partial = w.partial + w.first[j];
  job.rows = product ? w.widths[j] : 1;
  job.cols = product ? w.rank : w.widths[j];
  job.expert_stride = job.rows * job.cols;
  job.experts = add ? 1 : static_cast<int32_t>(w.experts);
  job.splits = add ? splits * w.experts : splits;
  job.split_stride = job.expert_stride * (add ? 1 : w.experts);
  const int64_t sizes[] = {down && product ? w.rank
                           : product       ? w.widths[j]
                                           : job.cols,
                           down ? w.widths[kGradDown] : w.rank};
  STD_TORCH_CHECK(grad.dim() == (product ? 3 : 2) && grad.size(0) == job.experts &&
                      grad.size(1) == sizes[0] && (!product || grad.size(2) == sizes[1]),
                  "expert_dispatch_bwd_weights: gradient ", j,
                  " does not have its parameter's shape");
  job.out = grad.data_ptr();
  job.dtype = dtype_of(grad, "expert_dispatch_bwd_weights: gradient");
  job.stride_expert = grad.stride(0);
  job.stride_row = product ? grad.stride(down ? 2 : 1) : 0;
  job.stride_col = grad.stride(product && !down ? 2 : 1);
  const bool up = j == kGradUp || j == kGradUpBias;
  job.scale = up ? static_cast<float>(mix) : 1.0f;
  return job;
}

void expert_dispatch_bwd_weights(Tensor dout, MaybeTensor x, MaybeTensors work, MaybeTensors grads,
                                 int64_t experts, int64_t rank, double mix, int64_t splits) {
  STD_TORCH_CHECK(splits >= 1 && grads.size() == kMaxExpertReduces && work.size() == kWork,
                  "expert_dispatch_bwd_weights: want a split and ", kMaxExpertReduces,
                  " gradients");
  Weights w = weights_of(dout, x, work, grads, experts, rank, splits);
  Tensor partial = torch::stable::new_empty(dout, {w.first[kMaxExpertReduces]}, ScalarType::Float);
  w.partial = static_cast<float*>(partial.data_ptr());
  const ExpertWeightsParams products = products_of(w, grads, splits);
  const ExpertSumsParams sums = sums_of(w, grads, splits);
  ExpertReduceParams reduce = {};
  for (int j = 0; j < kMaxExpertReduces; ++j) {
    if (grads[j].has_value()) reduce.job[reduce.jobs++] = reduce_of(*grads[j], j, w, mix, splits);
  }
  const Device device(dout);
  const char* const name = "expert_dispatch_bwd_weights";
  if (products.product[0].width + products.product[1].width > 0)
    check_launch(launch_expert_dispatch_bwd_weights(products, device.stream()), name);
  if (sums.jobs > 0) check_launch(launch_expert_dispatch_bwd_sums(sums, device.stream()), name);
  if (reduce.jobs > 0)
    check_launch(launch_expert_dispatch_bwd_reduce(reduce, device.stream()), name);
}

// What the largest block asks for.
int64_t expert_dispatch_shared_bytes(Tensor like, int64_t experts, int64_t rank) {
  const DType dtype = dtype_of(like, "expert_dispatch_shared_bytes");
  const size_t rows = expert_dispatch_fwd_bytes(dtype, static_cast<int>(experts),
                                                static_cast<int>(rank)),
               weights = expert_dispatch_bwd_weights_bytes(dtype);
  return static_cast<int64_t>(rows > weights ? rows : weights);
}

}  // namespace
}  // namespace petal

PETAL_LIBRARY_FRAGMENT(PETAL_CUDA_LIBRARY, m) {
  m.def(
      "expert_dispatch_fwd(Tensor?[] tensors, Tensor(a!)?[] work, int[] codes, float[] numbers, "
      "bool "
      "form_logits, bool form_z, bool by_slot) -> ()");
  m.def(
      "expert_dispatch_bwd_rows(Tensor dout, Tensor?[] tensors, Tensor(a!)?[] work, int[] codes, "
      "float[] "
      "numbers, bool form_dz, bool form_dx, bool by_slot) -> ()");
  m.def(
      "expert_dispatch_fwd_sort(Tensor chosen, Tensor(a!) order, Tensor(b!) offsets, Tensor(c!) "
      "inverse) -> ()");
  m.def("expert_dispatch_bwd_invert(Tensor order, Tensor offsets, Tensor(a!) inverse) -> ()");
  m.def(
      "expert_dispatch_bwd_weights(Tensor dout, Tensor? x, Tensor?[] work, Tensor(a!)?[] grads, "
      "int experts, "
      "int rank, float mix, int splits) -> ()");
  m.def("expert_dispatch_shared_bytes(Tensor like, int experts, int rank) -> int");
}

PETAL_LIBRARY_IMPL(PETAL_CUDA_LIBRARY, PETAL_CUDA_KEY, m) {
  m.impl("expert_dispatch_fwd", TORCH_BOX(&petal::expert_dispatch_fwd));
  m.impl("expert_dispatch_bwd_rows", TORCH_BOX(&petal::expert_dispatch_bwd_rows));
  m.impl("expert_dispatch_fwd_sort", TORCH_BOX(&petal::expert_dispatch_fwd_sort));
  m.impl("expert_dispatch_bwd_invert", TORCH_BOX(&petal::expert_dispatch_bwd_invert));
  m.impl("expert_dispatch_bwd_weights", TORCH_BOX(&petal::expert_dispatch_bwd_weights));
  m.impl("expert_dispatch_shared_bytes", TORCH_BOX(&petal::expert_dispatch_shared_bytes));
}
