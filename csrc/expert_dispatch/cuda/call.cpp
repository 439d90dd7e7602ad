// expert_dispatch on CUDA: checks, parameter structs and registration.
// Kernels: {sort,forward,backward,weights}.cu. These functions write into tensors their caller has
// allocated; they are called by ops/expert_dispatch/cuda_impl.py only.
#include "common/cuda/host.h"
#include "params.h"

namespace petal {
namespace {

using MaybeTensor = std::optional<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;

// The fields of arguments.Tensors.
enum Input {
  kX,
  kDown,
  kDownBias,
  kUp,
  kUpBias,
  kBase,
  kRouter,
  kRouterBias,
  kNoise,
  kGates,
  kChosen,
  kInputs
};

// The fields of cuda_impl.Work.
enum Work {
  kZ,
  kLogits,
  kChoice,
  kOrder,
  kOffsets,
  kInverse,
  kOut,
  kDz,
  kGa,
  kDx,
  kDgates,
  kWeights,
  kDlogits,
  kWork
};

// cuda_impl's integers and numbers.
enum Code {
  kActivation,
  kGate,
  kExperts,
  kRank,
  kTopK,
  kRenormalize,
  kTokensPerGate,
  kAddInput,
  kShared,
  kCodes
};
enum Number { kKeep, kMix, kNumbers };

struct Call {
  MaybeTensors tensors, work;
  std::vector<int64_t> codes;
  std::vector<double> numbers;
};

void want(bool given, const char* name) {
  STD_TORCH_CHECK(given, name, ": want a tensor, got none");
}

MatrixView view(const MaybeTensor& tensor, DType dtype, int64_t rows, int64_t cols,
                const char* name) {
  if (!tensor.has_value()) return {};
  STD_TORCH_CHECK(dtype_of(*tensor, name) == dtype, name, ": want the dtype of the activations");
  return matrix(*tensor, rows, cols, name);
}

// A contiguous tensor of `count` elements.
VectorView vector(const MaybeTensor& tensor, DType dtype, int64_t count, const char* name) {
  VectorView v;
  if (!tensor.has_value()) return v;
  const DType found = dtype_of(*tensor, name);
  STD_TORCH_CHECK(tensor->is_contiguous() && tensor->numel() == count, name, ": want ", count,
                  " contiguous elements");
  STD_TORCH_CHECK(found == dtype || found == DType::kFloat32, name,
                  ": want the dtype of the activations or float32");
  v.data = tensor->data_ptr();
  v.stride = 1;
  v.wide = found == DType::kFloat32;
  return v;
}

template <typename T>
T* typed(const MaybeTensor& tensor, ScalarType type, int64_t count, const char* name) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(
      tensor->scalar_type() == type && tensor->is_contiguous() && tensor->numel() == count, name,
      ": want ", count, " contiguous elements of its dtype");
  return static_cast<T*>(tensor->data_ptr());
}
float* floats(const MaybeTensor& tensor, int64_t count, const char* name) {
  return typed<float>(tensor, ScalarType::Float, count, name);
}
int32_t* ints(const MaybeTensor& tensor, int64_t count, const char* name) {
  return typed<int32_t>(tensor, ScalarType::Int, count, name);
}

// The row tensors' widths come from the weights: down [E r or r, D], up [O, E r].
ExpertParams params_of(const Call& call, DType dtype, int64_t rows) {
  STD_TORCH_CHECK(call.tensors.size() == kInputs && call.work.size() == kWork &&
                      call.codes.size() == kCodes && call.numbers.size() == kNumbers,
                  "expert_dispatch: a list of another length");
  const MaybeTensors &t = call.tensors, &w = call.work;
  const std::vector<int64_t>& codes = call.codes;
  ExpertParams p = {};
  p.dtype = dtype;
  p.rows = rows;
  p.experts = static_cast<int32_t>(codes[kExperts]);
  p.rank = static_cast<int32_t>(codes[kRank]);
  p.top_k = static_cast<int32_t>(codes[kTopK]);
  STD_TORCH_CHECK(p.experts >= 1 && p.experts <= kMaxExperts, "experts: want 1 to ", kMaxExperts,
                  ", got ", p.experts);
  STD_TORCH_CHECK(p.rank >= 1 && p.rank <= kMaxExpertRank, "rank: want 1 to ", kMaxExpertRank,
                  ", got ", p.rank);
  STD_TORCH_CHECK(p.top_k >= 0 && p.top_k <= p.experts, "top_k: want at most ", p.experts, ", got ",
                  p.top_k);
  const int64_t experts = p.experts, inner = experts * p.rank;
  p.activation = static_cast<Activation>(codes[kActivation]);
  p.gate = static_cast<ExpertGate>(codes[kGate]);
  p.renormalize = codes[kRenormalize] != 0;
  p.tokens_per_gate = codes[kTokensPerGate];
  STD_TORCH_CHECK(p.tokens_per_gate >= 1 && rows % p.tokens_per_gate == 0,
                  "tokens_per_gate: want a divisor of ", rows, ", got ", p.tokens_per_gate);
  p.shared = codes[kShared] != 0;
  p.keep = static_cast<float>(call.numbers[kKeep]);
  p.mix = static_cast<float>(call.numbers[kMix]);
  want(t[kDown].has_value() && t[kDown]->dim() == 2, "down");
  want(t[kUp].has_value() && t[kUp]->dim() == 2, "up");
  p.width = t[kDown]->size(1);
  p.outs = t[kUp]->size(0);
  p.x = view(t[kX], dtype, rows, p.width, "x");
  p.up = view(t[kUp], dtype, p.outs, inner, "up");
  const bool routed = p.gate == ExpertGate::kSoftmax || p.gate == ExpertGate::kTopK;
  const int64_t gate_rows = rows / p.tokens_per_gate;
  p.up_bias = vector(t[kUpBias], dtype, p.outs * experts, "up_bias");
  if (routed) {
    STD_TORCH_CHECK(p.tokens_per_gate == 1, "tokens_per_gate: want 1 with a router, got ",
                    p.tokens_per_gate);
    p.router = vector(t[kRouter], dtype, experts * p.width, "router");
    p.router_bias = vector(t[kRouterBias], dtype, experts, "router_bias");
    p.noise = vector(t[kNoise], dtype, rows * experts, "noise");
    p.logits = floats(w[kLogits], rows * experts, "logits");
    want(p.logits != nullptr, "logits");
  }
  if (p.gate == ExpertGate::kGiven) {
    want(t[kGates].has_value(), "gates");
    p.gates = vector(t[kGates], dtype, gate_rows * experts, "gates");
  }
  const bool topk = p.gate == ExpertGate::kTopK;
  p.chosen = typed<uint8_t>(topk ? w[kChoice] : t[kChosen], ScalarType::Bool, gate_rows * experts,
                            "chosen");
  want(!topk || p.chosen != nullptr, "chosen");
  if (w[kOrder].has_value()) {
    p.slots = w[kOrder]->numel();
    p.order = ints(w[kOrder], p.slots, "order");
    p.offsets = ints(w[kOffsets], experts + 1, "offsets");
    p.inverse = ints(w[kInverse], rows * experts, "inverse");
    want(p.offsets != nullptr && p.inverse != nullptr, "offsets and inverse");
  }
  const bool sorted = p.order != nullptr;
  p.z = view(w[kZ], dtype, sorted ? p.slots : rows, sorted || p.shared ? p.rank : inner, "z");
  return p;
}

// Logits and choice, z, and the output where `work` has room for it.
void expert_dispatch_fwd(MaybeTensors tensors, MaybeTensors work, std::vector<int64_t> codes,
                         std::vector<double> numbers, bool form_logits, bool form_z, bool by_slot) {
  const Call call{tensors, work, codes, numbers};
  STD_TORCH_CHECK(tensors.size() == kInputs, "expert_dispatch: a list of another length");
  want(tensors[kX].has_value(), "x");
  const Tensor& x = *tensors[kX];
  ExpertFwdParams p = {};
  p.f = params_of(call, dtype_of(x, "x"), x.size(0));
  ExpertParams& f = p.f;
  f.down = view(tensors[kDown], f.dtype, (f.shared ? 1 : f.experts) * f.rank, f.width, "down");
  f.down_bias =
      vector(tensors[kDownBias], f.dtype, (f.shared ? 1 : f.experts) * f.rank, "down_bias");
  p.form_logits = form_logits;
  p.form_z = form_z;
  p.by_slot = by_slot;
  want(!form_logits || f.router.data != nullptr, "router");
  want(!by_slot || f.order != nullptr, "order");
  if (work[kOut].has_value() && !by_slot) {
    p.out = view(work[kOut], f.dtype, f.rows, f.outs, "out");
    p.h =
        view(codes[kAddInput] != 0 ? tensors[kX] : tensors[kBase], f.dtype, f.rows, f.outs, "base");
  }
  want(f.z.data != nullptr || (!form_z && p.out.data == nullptr), "z");
  const Device device(x);
  check_launch(launch_expert_fwd(p, device.stream()), "expert_dispatch_fwd");
}

// dz, ga and dgates, then what follows by token: dlogits in dgates' place, the gates, dx.
void expert_dispatch_bwd_rows(Tensor dout, MaybeTensors tensors, MaybeTensors work,
                              std::vector<int64_t> codes, std::vector<double> numbers, bool form_dz,
                              bool form_dx, bool by_slot) {
  const Call call{tensors, work, codes, numbers};
  ExpertRowsParams p = {};
  p.f = params_of(call, dtype_of(dout, "dout"), dout.size(0));
  ExpertParams& f = p.f;
  const int64_t experts = f.experts, inner = experts * f.rank;
  const bool sorted = f.order != nullptr;
  const int64_t kept_rows = sorted ? f.slots : f.rows, kept_cols = sorted ? f.rank : inner;
  f.down = view(tensors[kDown], f.dtype, inner, f.width, "down");
  p.dout = matrix(dout, f.rows, f.outs, "dout");
  p.dz = view(work[kDz], f.dtype, kept_rows, kept_cols, "dz");
  p.ga = view(work[kGa], f.dtype, kept_rows, kept_cols, "ga");
  p.dx = view(work[kDx], f.dtype, f.rows, f.width, "dx");
  p.dgates = floats(work[kDgates], f.rows * experts, "dgates");
  p.weights = floats(work[kWeights], f.rows * experts, "weights");
  p.dlogits = floats(work[kDlogits], f.rows * experts, "dlogits");
  p.form_dz = form_dz;
  p.form_dx = form_dx;
  p.by_slot = by_slot;
  p.adds_dout = codes[kAddInput] != 0;
  STD_TORCH_CHECK(!p.adds_dout || f.outs == f.width, "dx: want the width of dout, got ", f.width);
  want(!form_dz || f.z.data != nullptr, "z");
  want(p.dx.data == nullptr || p.dz.data != nullptr, "dz");
  want(!by_slot || sorted, "order");
  want(f.logits == nullptr || p.dx.data == nullptr || f.router.data != nullptr, "router");
  const Device device(dout);
  check_launch(launch_expert_rows(p, device.stream()), "expert_dispatch_bwd_rows");
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
  p.chosen = typed<uint8_t>(chosen, ScalarType::Bool, chosen.numel(), "chosen");
  p.tokens_per_gate = p.rows / chosen.size(0);
  Tensor counts =
      torch::stable::new_empty(order, {ceil_div(p.rows, kSortTokens) * p.experts}, ScalarType::Int);
  p.counts = static_cast<int32_t*>(counts.data_ptr());
  const Device device(order);
  check_launch(launch_expert_sort(p, device.stream()), "expert_dispatch_fwd_sort");
}

void expert_dispatch_bwd_invert(Tensor order, Tensor offsets, Tensor inverse) {
  const ExpertSortParams p = sort_params(order, offsets, inverse);
  const Device device(order);
  check_launch(launch_expert_invert(p, device.stream()), "expert_dispatch_bwd_invert");
}

// `grads` and what forms them: up (dout, ga), down (x, dz), up_bias (dout, the gates), router (x,
// the logits' gradient) and, sorted, down_bias (dz).
constexpr int kProducts = 2;
void expert_dispatch_bwd_weights(Tensor dout, MaybeTensor x, MaybeTensors work, MaybeTensors grads,
                                 int64_t experts, int64_t rank, double mix, int64_t splits) {
  STD_TORCH_CHECK(splits >= 1 && grads.size() == kMaxExpertFolds && work.size() == kWork,
                  "expert_dispatch_bwd_weights: want a split and ", kMaxExpertFolds, " gradients");
  const DType dtype = dtype_of(dout, "dout");
  const int64_t rows = dout.size(0), outs = dout.size(1), inner = experts * rank;
  ExpertWeightsParams p = {};
  p.dtype = dtype;
  p.rows = rows;
  p.experts = static_cast<int32_t>(experts);
  p.rank = static_cast<int32_t>(rank);
  p.splits = splits;
  if (work[kOrder].has_value()) {
    p.order = ints(work[kOrder], work[kOrder]->numel(), "order");
    p.offsets = ints(work[kOffsets], experts + 1, "offsets");
    want(p.offsets != nullptr, "offsets");
  }
  const bool sorted = p.order != nullptr;
  const int64_t kept_rows = sorted ? work[kOrder]->numel() : rows,
                kept_cols = sorted ? rank : inner;
  const MatrixView dout_view = matrix(dout, rows, outs, "dout");
  MatrixView x_view;
  int64_t width = 0;
  if (grads[1].has_value() || grads[3].has_value()) {
    want(x.has_value() && x->dim() == 2, "x");
    width = x->size(1);
    x_view = view(x, dtype, rows, width, "x");
  }
  const MatrixView dz = view(work[kDz], dtype, kept_rows, kept_cols, "dz");
  const MatrixView sides[] = {view(work[kGa], dtype, kept_rows, kept_cols, "ga"), dz};
  const int64_t widths[] = {outs, width, outs, width, rank};

  // Every partial starts on 16 bytes.
  int64_t first[kMaxExpertFolds + 1] = {};
  for (int j = 0; j < kMaxExpertFolds; ++j) {
    const int64_t each = widths[j] * (j < kProducts ? rank : 1);
    first[j + 1] = first[j] + (grads[j].has_value() ? ceil_div(splits * experts * each, 4) * 4 : 0);
  }
  Tensor partial = torch::stable::new_empty(dout, {first[kMaxExpertFolds]}, ScalarType::Float);
  float* const data = static_cast<float*>(partial.data_ptr());
  for (int j = 0; j < kProducts; ++j) {
    if (!grads[j].has_value()) continue;
    want(sides[j].data != nullptr, j == 0 ? "ga" : "dz");
    p.product[j] = {j == 0 ? dout_view : x_view, sides[j], widths[j], data + first[j]};
  }
  ExpertSumsParams sums = {};
  sums.rows = rows;
  sums.experts = p.experts;
  sums.offsets = p.offsets;
  sums.splits = splits;
  const MatrixView inputs[] = {dout_view, x_view, dz};
  const float* const factors[] = {floats(work[kWeights], rows * experts, "weights"),
                                  floats(work[kDgates], rows * experts, "dgates"), nullptr};
  for (int j = 0; j < kMaxExpertSums; ++j) {
    if (!grads[kProducts + j].has_value()) continue;
    want(inputs[j].data != nullptr && (j == 2 ? sorted : factors[j] != nullptr),
         "what a sum is formed of");
    sums.job[sums.jobs++] = {inputs[j], dtype, widths[kProducts + j], factors[j],
                             data + first[kProducts + j]};
  }
  ExpertFoldParams fold = {};
  for (int j = 0; j < kMaxExpertFolds; ++j) {
    if (!grads[j].has_value()) continue;
    const Tensor& grad = *grads[j];
    const bool product = j < kProducts, down = j == 1 || j == 4;
    // One down-projection for all: the experts are added like splits.
    const bool add = down && grad.size(0) != experts;
    ExpertFold& job = fold.job[fold.jobs++];
    job.partial = data + first[j];
    job.rows = product ? widths[j] : 1;
    job.cols = product ? rank : widths[j];
    job.expert_stride = job.rows * job.cols;
    job.experts = add ? 1 : p.experts;
    job.splits = add ? splits * experts : splits;
    job.split_stride = job.expert_stride * (add ? 1 : experts);
    const int64_t sizes[] = {down && product ? rank
                             : product       ? widths[j]
                                             : job.cols,
                             down ? width : rank};
    STD_TORCH_CHECK(grad.dim() == (product ? 3 : 2) && grad.size(0) == job.experts &&
                        grad.size(1) == sizes[0] && (!product || grad.size(2) == sizes[1]),
                    "expert_dispatch_bwd_weights: gradient ", j,
                    " does not have its parameter's shape");
    job.out = grad.data_ptr();
    job.dtype = dtype_of(grad, "expert_dispatch_bwd_weights: gradient");
    job.stride_expert = grad.stride(0);
    job.stride_row = product ? grad.stride(down ? 2 : 1) : 0;
    job.stride_col = grad.stride(product && !down ? 2 : 1);
    job.scale = j == 0 || j == 2 ? static_cast<float>(mix) : 1.0f;
  }
  const Device device(dout);
  if (p.product[0].width + p.product[1].width > 0)
    check_launch(launch_expert_weights(p, device.stream()), "expert_dispatch_bwd_weights");
  if (sums.jobs > 0)
    check_launch(launch_expert_sums(sums, device.stream()), "expert_dispatch_bwd_weights");
  if (fold.jobs > 0)
    check_launch(launch_expert_fold(fold, device.stream()), "expert_dispatch_bwd_weights");
}

// What the largest block asks for.
int64_t expert_dispatch_shared_bytes(Tensor like, int64_t experts, int64_t rank) {
  const DType dtype = dtype_of(like, "expert_dispatch_shared_bytes");
  const size_t rows = expert_fwd_bytes(dtype, static_cast<int>(experts), static_cast<int>(rank)),
               weights = expert_weights_bytes(dtype);
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
