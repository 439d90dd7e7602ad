// gated_bottleneck on CUDA: checks, parameter structs and registration.
// Kernels: {forward,backward,weights}.cu. These functions write into tensors their caller has
// allocated; they are called by ops/gated_bottleneck/cuda_impl.py only.
#include <string>

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
  kBottleneck,
  kUp,
  kUpBiasInput,
  kBase,
  kLeft,
  kRight,
  kGateInput,
  kGateDown,
  kGateDownBias,
  kGateUp,
  kGateUpBias,
  kGateWeight,
  kGateBias,
  kTokenWeights,
  kResidual,
  kNormWeightInput,
  kNormBiasInput,
  kInputs
};

// The fields of cuda_impl.Work.
enum Work {
  kZ,
  kZg,
  kLogits,
  kPooled,
  kMoments,
  kFold,
  kSums,
  kTotals,
  kA,
  kAg,
  kDz,
  kDzg,
  kDq,
  kDu,
  kDh,
  kDxGate,
  kDx,
  kWork
};

// cuda_impl's integers and numbers.
enum Code {
  kActivation,
  kRoute,
  kRouteRelu,
  kGate,
  kGateLinear,
  kSeesOutput,
  kAddInput,
  kAddGateInput,
  kSamples,
  kCodes
};
enum Number { kScale, kDropout, kEps, kNumbers };

struct Call {
  MaybeTensors tensors, work;
  MaybeTensor rng;
  std::vector<int64_t> codes;
  std::vector<double> numbers;
};

void want(bool given, const char* name) {
  STD_TORCH_CHECK(given, name, ": want a tensor, got none");
}

int64_t size(const MaybeTensor& tensor, int64_t dim, const char* name) {
  STD_TORCH_CHECK(tensor.has_value() && tensor->dim() == 2, name, ": want a matrix");
  return tensor->size(dim);
}

MatrixView view(const MaybeTensor& tensor, DType dtype, int64_t rows, int64_t cols,
                const char* name) {
  if (!tensor.has_value()) return {};
  STD_TORCH_CHECK(dtype_of(*tensor, name) == dtype, name, ": want the dtype of the activations");
  return matrix(*tensor, rows, cols, name);
}

MatrixView needed(const MaybeTensor& tensor, DType dtype, int64_t rows, int64_t cols,
                  const char* name) {
  want(tensor.has_value(), name);
  return view(tensor, dtype, rows, cols, name);
}

// Elements [first, first + length) of a vector of `size` elements.
VectorView vector(const MaybeTensor& tensor, DType dtype, int64_t size, const char* name,
                  int64_t first = 0) {
  VectorView v;
  if (!tensor.has_value()) return v;
  const DType found = dtype_of(*tensor, name);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size, name, ": want [", size, "]");
  STD_TORCH_CHECK(found == dtype || found == DType::kFloat32, name,
                  ": want the dtype of the activations or float32");
  v.stride = tensor->stride(0);
  v.wide = found == DType::kFloat32;
  v.data = static_cast<const char*>(tensor->data_ptr()) +
           first * v.stride * static_cast<int64_t>(tensor->element_size());
  return v;
}

float* floats(const MaybeTensor& tensor, int64_t count, const char* name) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() &&
                      tensor->numel() == count,
                  name, ": want ", count, " contiguous float32 elements");
  return static_cast<float*>(tensor->data_ptr());
}

GatedParams params_of(const Call& call, DType dtype, int64_t rows) {
  STD_TORCH_CHECK(call.tensors.size() == kInputs && call.work.size() == kWork &&
                      call.codes.size() == kCodes && call.numbers.size() == kNumbers,
                  "gated_bottleneck: a list of another length");
  const MaybeTensors &t = call.tensors, &w = call.work;
  const std::vector<int64_t>& codes = call.codes;
  GatedParams p = {};
  p.dtype = dtype;
  p.rows = rows;
  p.kind = static_cast<Gate>(codes[kGate]);
  p.activation = static_cast<Activation>(codes[kActivation]);
  p.route = static_cast<Route>(codes[kRoute]);
  p.route_relu = codes[kRouteRelu] != 0;
  p.gate_linear = codes[kGateLinear] != 0;
  p.adds_gate_input = codes[kAddGateInput] != 0;
  const bool row_gate = p.kind == Gate::kMiddleX || p.kind == Gate::kSmall;
  p.sees_output = row_gate && codes[kSeesOutput] != 0;
  const int64_t samples = codes[kSamples];
  STD_TORCH_CHECK(samples >= 1 && rows % samples == 0, "samples: want a divisor of ", rows,
                  ", got ", samples);
  p.length = rows / samples;
  p.outs = size(t[kUp], 0, "up");
  p.down.rank = static_cast<int32_t>(size(t[kUp], 1, "up"));
  p.up = view(t[kUp], dtype, p.outs, p.down.rank, "up");
  p.down.z = view(w[kZ], dtype, rows, p.down.rank, "z");
  if (t[kDown].has_value()) {
    p.down.width = size(t[kDown], 1, "down");
    p.down.weight = view(t[kDown], dtype, p.down.rank, p.down.width, "down");
    p.down.bias = vector(t[kDownBias], dtype, p.down.rank, "down_bias");
    p.down.in = view(t[kX], dtype, rows, p.down.width, "x");
  }
  if (p.kind == Gate::kLarge) {
    p.gate.rank = static_cast<int32_t>(size(t[kGateUp], 1, "gate_up"));
    p.gate.width = size(t[kGateDown], 1, "gate_down");
    p.gate_up = view(t[kGateUp], dtype, p.outs, p.gate.rank, "gate_up");
    p.gate.weight = view(t[kGateDown], dtype, p.gate.rank, p.gate.width, "gate_down");
    p.gate.bias = vector(t[kGateDownBias], dtype, p.gate.rank, "gate_down_bias");
    p.gate.in = view(t[kGateInput], dtype, rows, p.gate.width, "gate_input");
    p.gate.z = view(w[kZg], dtype, rows, p.gate.rank, "zg");
  }
  for (const int32_t rank : {p.down.rank, p.gate.rank})
    STD_TORCH_CHECK(rank <= kMaxGatedRank, "gated_bottleneck: want ranks of at most ",
                    kMaxGatedRank, ", got ", rank);
  if (p.route != Route::kNone) p.left = needed(t[kLeft], dtype, samples, p.down.rank, "left");
  if (p.route == Route::kProduct) p.right = needed(t[kRight], dtype, samples, p.down.rank, "right");
  if (row_gate || p.adds_gate_input)
    p.gate_input = view(t[kGateInput], dtype, rows, p.outs, "gate_input");
  p.h = view(codes[kAddInput] != 0 ? t[kX] : t[kBase], dtype, rows, p.outs, "base");
  p.residual =
      p.adds_gate_input ? p.gate_input : view(t[kResidual], dtype, rows, p.outs, "residual");

  const bool pair = p.kind == Gate::kSmall;
  const MaybeTensor& weight = t[kGateWeight];
  p.columns[kUpBias] = vector(t[kUpBiasInput], dtype, p.outs, "up_bias");
  p.columns[kNormWeight] = vector(t[kNormWeightInput], dtype, p.outs, "norm_weight");
  p.columns[kNormBias] = vector(t[kNormBiasInput], dtype, p.outs, "norm_bias");
  if (p.kind == Gate::kLarge)
    p.columns[kGateColumn] = vector(t[kGateUpBias], dtype, p.outs, "gate_up_bias");
  if (p.kind == Gate::kMiddleY)
    p.columns[kGateColumn] = vector(weight, dtype, p.outs, "gate_weight");
  if (row_gate) {
    const int64_t count = pair ? 2 * p.outs : p.outs;
    want(weight.has_value(), "gate_weight");
    p.columns[kInputWeight] = vector(weight, dtype, count, "gate_weight");
    p.columns[kSeenWeight] = vector(weight, dtype, count, "gate_weight", pair ? p.outs : 0);
    p.gate_bias = vector(t[kGateBias], dtype, 1, "gate_bias");
    p.logits = floats(w[kLogits], rows, "logits");
    p.pooled = floats(w[kPooled], samples, "pooled");
    p.fold = floats(w[kFold], p.down.rank, "fold");
  }
  p.moments = floats(w[kMoments], 2 * rows, "moments");
  p.scale = static_cast<float>(call.numbers[kScale]);
  p.eps = static_cast<float>(call.numbers[kEps]);
  p.dropout = dropout_of(call.rng, call.numbers[kDropout]);
  return p;
}

// What forward has left.
void check_saved(const GatedParams& f) {
  want(f.kind != Gate::kLarge || f.gate.z.data != nullptr, "zg");
  want((f.kind != Gate::kMiddleX && f.kind != Gate::kSmall) || f.logits != nullptr, "logits");
  want(f.kind != Gate::kSmall || f.pooled != nullptr, "pooled");
  want(f.columns[kNormWeight].data == nullptr || f.moments != nullptr, "moments");
}

// z (zg, logits) into `work`, or what is there already; then out, where it is given.
void gated_bottleneck_fwd(MaybeTensors tensors, MaybeTensors work, MaybeTensor out, MaybeTensor rng,
                          std::vector<int64_t> codes, std::vector<double> numbers, bool form_z,
                          bool form_zg, bool form_logits) {
  const Call call{tensors, work, rng, codes, numbers};
  STD_TORCH_CHECK(tensors.size() == kInputs && work.size() == kWork,
                  "gated_bottleneck: a list of another length");
  const MaybeTensor& first = form_z ? tensors[kX] : work[kZ];
  want(first.has_value(), form_z ? "x" : "z");
  GatedParams p = params_of(call, dtype_of(*first, "gated_bottleneck_fwd"), first->size(0));
  p.down.form = form_z;
  p.gate.form = form_zg && p.gate.rank > 0;
  p.form_logits = form_logits;
  if (!form_zg) p.gate.rank = p.gate.z.data != nullptr ? p.gate.rank : 0;
  if (form_logits) {
    want(p.gate_input.data != nullptr, "gate_input");
    want(!p.sees_output || p.fold != nullptr, "fold");
  }
  if (out.has_value()) {
    want(p.kind != Gate::kLarge || p.gate.rank > 0, "zg");
    want(p.kind != Gate::kSmall || p.pooled != nullptr, "pooled");
    p.out = view(out, p.dtype, p.rows, p.outs, "out");
  }
  const Device device(*first);
  check_launch(launch_gated_fwd(p, device.stream()), "gated_bottleneck_fwd");
}

// out[b] = the sum of values, or of weight times their sigmoid, over the tokens of a sample.
void gated_bottleneck_pool(Tensor values, MaybeTensor token_weights, Tensor out, bool sigmoid) {
  GatedPoolParams p = {};
  p.samples = out.numel();
  STD_TORCH_CHECK(values.dim() == 1 && values.scalar_type() == ScalarType::Float && p.samples > 0 &&
                      values.size(0) % p.samples == 0,
                  "gated_bottleneck_pool: want a float32 vector of whole samples");
  p.values = static_cast<const float*>(values.data_ptr());
  p.stride = values.stride(0);
  p.length = values.size(0) / p.samples;
  p.token_weights = floats(token_weights, values.size(0), "token_weights");
  p.sigmoid = sigmoid;
  p.out = floats(out, p.samples, "out");
  const Device device(out);
  check_launch(launch_gated_pool(p, device.stream()), "gated_bottleneck_pool");
}

// The row sums, then dz, dzg and the row gradients that `work` has room for.
void gated_bottleneck_bwd_rows(Tensor dout, MaybeTensors tensors, MaybeTensors work,
                               MaybeTensor rng, std::vector<int64_t> codes,
                               std::vector<double> numbers, bool form_sums, bool form_columns,
                               bool read_dz) {
  const Call call{tensors, work, rng, codes, numbers};
  GatedRowsParams p = {};
  p.f = params_of(call, dtype_of(dout, "gated_bottleneck_bwd_rows"), dout.size(0));
  const GatedParams& f = p.f;
  const DType dtype = f.dtype;
  const int64_t rows = f.rows;
  p.dout = matrix(dout, rows, f.outs, "dout");
  p.sums = floats(work[kSums], rows * kRowSums, "sums");
  p.totals = floats(work[kTotals], codes[kSamples], "totals");
  p.token_weights = floats(tensors[kTokenWeights], rows, "token_weights");
  p.a = view(work[kA], dtype, rows, f.down.rank, "a");
  p.dz = view(work[kDz], dtype, rows, f.down.rank, "dz");
  p.dq = view(work[kDq], dtype, rows, f.down.rank, "dq");
  if (f.kind == Gate::kLarge) {
    p.ag = view(work[kAg], dtype, rows, f.gate.rank, "ag");
    p.dzg = view(work[kDzg], dtype, rows, f.gate.rank, "dzg");
  }
  p.du = view(work[kDu], dtype, rows, f.outs, "du");
  p.dh = view(work[kDh], dtype, rows, f.outs, "dh");
  p.dx_gate =
      view(work[kDxGate], dtype, rows, f.kind == Gate::kLarge ? f.gate.width : f.outs, "dx_gate");
  p.dx = view(work[kDx], dtype, rows, f.down.width, "dx");
  p.form_sums = form_sums;
  p.form_columns = form_columns;
  p.need_dz = p.dz.data != nullptr;
  p.need_dzg = p.dzg.data != nullptr;
  p.read_dz = read_dz;
  p.dx_on_dh = codes[kAddInput] != 0;
  if (read_dz) {
    want(p.need_dz && p.dx.data != nullptr, "dz and dx");
  } else {
    want(f.down.z.data != nullptr, "z");
    want(p.sums != nullptr || (!form_sums && p.totals == nullptr), "sums");
    check_saved(f);
  }
  const Device device(dout);
  check_launch(launch_gated_rows(p, device.stream()), "gated_bottleneck_bwd_rows");
}

// `grads`: dU, dGu, dD, dGd, then one per ColumnSum.
void gated_bottleneck_bwd_weights(Tensor dout, MaybeTensors tensors, MaybeTensors work,
                                  MaybeTensors grads, MaybeTensor rng, std::vector<int64_t> codes,
                                  std::vector<double> numbers, int64_t splits) {
  const Call call{tensors, work, rng, codes, numbers};
  GatedWeightsParams p = {};
  p.f = params_of(call, dtype_of(dout, "gated_bottleneck_bwd_weights"), dout.size(0));
  const GatedParams& f = p.f;
  constexpr int kMatrices = kMaxFolds - kColumnSums;
  STD_TORCH_CHECK(splits >= 1 && grads.size() == kMaxFolds,
                  "gated_bottleneck_bwd_weights: want a split and ", kMaxFolds, " gradients");
  p.dout = matrix(dout, f.rows, f.outs, "dout");
  p.sums = floats(work[kSums], f.rows * kRowSums, "sums");
  p.need_up = grads[0].has_value();
  p.need_gate_up = grads[1].has_value() && f.gate.rank > 0;
  for (int k = 0; k < kColumnSums; ++k) p.wanted |= grads[kMatrices + k].has_value() ? 1u << k : 0u;
  if (p.need_up || p.need_gate_up || p.wanted != 0) {
    check_saved(f);
    p.a = needed(work[kA], f.dtype, f.rows, f.down.rank, "a");
    if (f.gate.rank > 0) p.ag = needed(work[kAg], f.dtype, f.rows, f.gate.rank, "ag");
  }
  const MaybeTensor inputs[] = {tensors[kX], tensors[kGateInput]}, dzs[] = {work[kDz], work[kDzg]};
  const Bottleneck sources[] = {f.down, f.gate};
  for (int j = 0; j < 2; ++j) {
    if (!grads[2 + j].has_value()) continue;
    DownGrad& d = p.down[j];
    d.width = sources[j].width;
    d.rank = sources[j].rank;
    d.in = needed(inputs[j], f.dtype, f.rows, d.width, "input");
    d.dz = needed(dzs[j], f.dtype, f.rows, d.rank, "dz");
  }
  p.splits = splits;

  // Every partial starts on 16 bytes.
  const int64_t widths[] = {p.need_up ? f.outs : 0, p.need_gate_up ? f.outs : 0, p.down[0].width,
                            p.down[1].width, p.wanted != 0 ? f.outs : 0};
  const int64_t ranks[] = {f.down.rank, f.gate.rank, f.down.rank, f.gate.rank, kColumnSums};
  int64_t first[kMatrices + 2] = {};
  for (int j = 0; j <= kMatrices; ++j)
    first[j + 1] = first[j] + ceil_div(splits * widths[j] * ranks[j], 4) * 4;
  Tensor partial = torch::stable::new_empty(dout, {first[kMatrices + 1]}, ScalarType::Float);
  float* const data = static_cast<float*>(partial.data_ptr());
  p.partial_up = data;
  p.partial_gate = data + first[1];
  p.down[0].partial = data + first[2];
  p.down[1].partial = data + first[3];
  p.partial_sums = data + first[4];
  GatedFoldParams fold = {};
  fold.splits = splits;
  for (int j = 0; j < kMaxFolds; ++j) {
    const bool sum = j >= kMatrices, down = j == 2 || j == 3;
    const int source = sum ? kMatrices : j;
    if (!grads[j].has_value() || widths[source] == 0) continue;
    const Tensor& grad = *grads[j];
    GatedFold& job = fold.job[fold.jobs++];
    job.rows = sum ? 1 : widths[source];
    job.cols = sum ? f.outs : ranks[source];
    job.partial = data + first[source] + (sum ? (j - kMatrices) * f.outs : 0);
    job.split_stride = widths[source] * ranks[source];
    STD_TORCH_CHECK(sum ? grad.dim() == 1 && grad.size(0) == f.outs
                        : grad.dim() == 2 && grad.size(down ? 1 : 0) == job.rows &&
                              grad.size(down ? 0 : 1) == job.cols,
                    "gated_bottleneck_bwd_weights: gradient ", j, ": want ", job.rows, " x ",
                    job.cols);
    job.out = grad.data_ptr();
    job.dtype = dtype_of(grad, "gated_bottleneck_bwd_weights: gradient");
    job.stride_row = sum ? 0 : grad.stride(down ? 1 : 0);
    job.stride_col = grad.stride(sum || down ? 0 : 1);
  }
  const Device device(dout);
  check_launch(launch_gated_weights(p, device.stream()), "gated_bottleneck_bwd_weights");
  check_launch(launch_gated_fold(fold, device.stream()), "gated_bottleneck_bwd_weights");
}

// What the largest block asks for: sm_80, sm_90 and sm_100 have it for every rank.
int64_t gated_bottleneck_shared_bytes(Tensor like, int64_t rank, int64_t gate_rank) {
  const DType dtype = dtype_of(like, "gated_bottleneck_shared_bytes");
  size_t most = 0;
  for (const auto bytes : {gated_fwd_bytes, gated_rows_bytes, gated_weights_bytes}) {
    const size_t found = bytes(dtype, static_cast<int>(rank), static_cast<int>(gate_rank));
    most = found > most ? found : most;
  }
  return static_cast<int64_t>(most);
}

}  // namespace
}  // namespace petal

PETAL_LIBRARY_FRAGMENT(PETAL_CUDA_LIBRARY, m) {
  m.def(
      "gated_bottleneck_fwd(Tensor?[] tensors, Tensor(a!)?[] work, Tensor(b!)? out, Tensor? rng, "
      "int[] codes, "
      "float[] numbers, bool form_z, bool form_zg, bool form_logits) -> ()");
  m.def(
      "gated_bottleneck_pool(Tensor values, Tensor? token_weights, Tensor(a!) out, bool sigmoid) "
      "-> ()");
  m.def(
      "gated_bottleneck_bwd_rows(Tensor dout, Tensor?[] tensors, Tensor(a!)?[] work, Tensor? rng, "
      "int[] codes, "
      "float[] numbers, bool form_sums, bool form_columns, bool read_dz) -> ()");
  m.def(
      "gated_bottleneck_bwd_weights(Tensor dout, Tensor?[] tensors, Tensor?[] work, Tensor(a!)?[] "
      "grads, Tensor? "
      "rng, int[] codes, float[] numbers, int splits) -> ()");
  m.def("gated_bottleneck_shared_bytes(Tensor like, int rank, int gate_rank) -> int");
}

PETAL_LIBRARY_IMPL(PETAL_CUDA_LIBRARY, PETAL_CUDA_KEY, m) {
  m.impl("gated_bottleneck_fwd", TORCH_BOX(&petal::gated_bottleneck_fwd));
  m.impl("gated_bottleneck_pool", TORCH_BOX(&petal::gated_bottleneck_pool));
  m.impl("gated_bottleneck_bwd_rows", TORCH_BOX(&petal::gated_bottleneck_bwd_rows));
  m.impl("gated_bottleneck_bwd_weights", TORCH_BOX(&petal::gated_bottleneck_bwd_weights));
  m.impl("gated_bottleneck_shared_bytes", TORCH_BOX(&petal::gated_bottleneck_shared_bytes));
}
