// gated_bottleneck on CUDA: checks, parameter structs and registration.
// Kernels: {forward,backward,weights}.cu. These functions write into tensors their caller has
// allocated; they are called by ops/gated_bottleneck/cuda_impl.py only.
#include "call.h"

namespace petal {
namespace {

// z (zg, logits) into `work`, or what is there already; then out, where it is given.
void gated_bottleneck_fwd(MaybeTensors tensors, MaybeTensors work, MaybeTensor out, MaybeTensor rng,
                          std::vector<int64_t> codes, std::vector<double> numbers, bool form_z,
                          bool form_zg, bool form_logits) {
  const Call call{tensors, work, rng, gated_settings(codes, numbers)};
  STD_TORCH_CHECK(tensors.size() == Input::kCount && work.size() == kWork,
                  "gated_bottleneck: a list of another length");
  const MaybeTensor& first = form_z ? tensors[Input::kX] : work[kZ];
  want(first.has_value(), form_z ? "x" : "z");
  GatedParams p = params_of(call, dtype_of(*first, "gated_bottleneck_fwd"), first->size(0));
  p.down.form = form_z;
  p.gate.form = form_zg && p.gate.rank > 0;
  p.form_logits = form_logits;
  if (!form_zg) p.gate.rank = p.gate.z.data != nullptr ? p.gate.rank : 0;
  if (form_logits) {
    want(p.gate_input.data != nullptr, "gate_input");
    want(!p.sees_output || p.weight_a != nullptr, "weight_a");
  }
  if (out.has_value()) {
    want(p.kind != Gate::kLarge || p.gate.rank > 0, "zg");
    want(p.kind != Gate::kSmall || p.pooled != nullptr, "pooled");
    p.out = view(out, p.dtype, p.rows, p.outs, "out");
  }
  const Device device(*first);
  check_launch(launch_gated_bottleneck_fwd(p, device.stream()), "gated_bottleneck_fwd");
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
  check_launch(launch_gated_bottleneck_pool(p, device.stream()), "gated_bottleneck_pool");
}

// The row sums, then dz, dzg and the row gradients that `work` has room for.
void gated_bottleneck_bwd_rows(Tensor dout, MaybeTensors tensors, MaybeTensors work,
                               MaybeTensor rng, std::vector<int64_t> codes,
                               std::vector<double> numbers, bool form_sums, bool form_columns,
                               bool read_dz) {
  const Call call{tensors, work, rng, gated_settings(codes, numbers)};
  GatedRowsParams p = {};
  p.f = params_of(call, dtype_of(dout, "gated_bottleneck_bwd_rows"), dout.size(0));
  const GatedParams& f = p.f;
  const DType dtype = f.dtype;
  const int64_t rows = f.rows;
  p.dout = matrix(dout, rows, f.outs, "dout");
  p.sums = floats(work[kSums], rows * kRowSums, "sums");
  p.totals = floats(work[kTotals], call.settings.samples, "totals");
  p.token_weights = floats(tensors[Input::kTokenWeights], rows, "token_weights");
  p.a = view(work[kA], dtype, rows, f.down.rank, "a");
  p.dz = view(work[kDz], dtype, rows, f.down.rank, "dz");
  p.dq = view(work[kDq], dtype, rows, f.down.rank, "dq");
  if (f.kind == Gate::kLarge) {
    p.ag = view(work[kAg], dtype, rows, f.gate.rank, "ag");
    p.dzg = view(work[kDzg], dtype, rows, f.gate.rank, "dzg");
  }
  p.du = view(work[kDu], dtype, rows, f.outs, "du");
  p.dh = view(work[kDh], dtype, rows, f.outs, "dh");
  p.dgate_input = view(work[kDgateInput], dtype, rows,
                       f.kind == Gate::kLarge ? f.gate.width : f.outs, "dgate_input");
  p.dx = view(work[kDx], dtype, rows, f.down.width, "dx");
  p.form_sums = form_sums;
  p.form_columns = form_columns;
  p.need_dz = p.dz.data != nullptr;
  p.need_dzg = p.dzg.data != nullptr;
  p.read_dz = read_dz;
  p.dx_on_dh = call.settings.add_input;
  if (read_dz) {
    want(p.need_dz && p.dx.data != nullptr, "dz and dx");
  } else {
    want(f.down.z.data != nullptr, "z");
    want(p.sums != nullptr || (!form_sums && p.totals == nullptr), "sums");
    check_saved(f);
  }
  const Device device(dout);
  check_launch(launch_gated_bottleneck_bwd_rows(p, device.stream()), "gated_bottleneck_bwd_rows");
}

// The gradients of the weights, in the order of `grads`: matrices, then one per ColumnSum.
enum WeightGradient { kGradUp, kGradGateUp, kGradDown, kGradGateDown, kMatrices };
static_assert(kMatrices + kColumnSums == kMaxReduces);

// What the wanted gradients are formed of; their partials are placed later.
GatedWeightsParams weights_params(const Call& call, const Tensor& dout, const MaybeTensors& grads) {
  const MaybeTensors &tensors = call.tensors, &work = call.work;
  GatedWeightsParams p = {};
  p.f = params_of(call, dtype_of(dout, "gated_bottleneck_bwd_weights"), dout.size(0));
  const GatedParams& f = p.f;
  p.dout = matrix(dout, f.rows, f.outs, "dout");
  p.sums = floats(work[kSums], f.rows * kRowSums, "sums");
  p.need_up = grads[kGradUp].has_value();
  p.need_gate_up = grads[kGradGateUp].has_value() && f.gate.rank > 0;
  for (int k = 0; k < kColumnSums; ++k) p.wanted |= grads[kMatrices + k].has_value() ? 1u << k : 0u;
  if (p.need_up || p.need_gate_up || p.wanted != 0) {
    check_saved(f);
    p.a = needed(work[kA], f.dtype, f.rows, f.down.rank, "a");
    if (f.gate.rank > 0) p.ag = needed(work[kAg], f.dtype, f.rows, f.gate.rank, "ag");
  }
  const MaybeTensor inputs[] = {tensors[Input::kX], tensors[Input::kGateInput]},
                    dzs[] = {work[kDz], work[kDzg]};
  const Bottleneck sources[] = {f.down, f.gate};
  for (int j = 0; j < 2; ++j) {
    if (!grads[kGradDown + j].has_value()) continue;
    DownGrad& d = p.down[j];
    d.width = sources[j].width;
    d.rank = sources[j].rank;
    d.in = needed(inputs[j], f.dtype, f.rows, d.width, "input");
    d.dz = needed(dzs[j], f.dtype, f.rows, d.rank, "dz");
  }
  return p;
}

// The partial sums of the matrices, then of all column sums: [splits, width, rank] each.
struct Partials {
  int64_t widths[kMatrices + 1], ranks[kMatrices + 1];
  int64_t first[kMatrices + 2];  // each starts on 16 bytes
};

Partials partials_of(const GatedWeightsParams& p) {
  const GatedParams& f = p.f;
  Partials at = {{p.need_up ? f.outs : 0, p.need_gate_up ? f.outs : 0, p.down[0].width,
                  p.down[1].width, p.wanted != 0 ? f.outs : 0},
                 {f.down.rank, f.gate.rank, f.down.rank, f.gate.rank, kColumnSums},
                 {}};
  for (int j = 0; j <= kMatrices; ++j)
    at.first[j + 1] = at.first[j] + ceil_div(p.splits * at.widths[j] * at.ranks[j], 4) * 4;
  return at;
}

// Where the sum of a gradient's partials goes.
GatedReduce reduce_of(const Tensor& grad, int j, const Partials& at, const float* data,
                      int64_t outs) {
  const bool sum = j >= kMatrices, down = j == kGradDown || j == kGradGateDown;
  const int source = sum ? kMatrices : j;
  GatedReduce job = {};
  job.rows = sum ? 1 : at.widths[source];
  job.cols = sum ? outs : at.ranks[source];
  job.partial = data + at.first[source] + (sum ? (j - kMatrices) * outs : 0);
  job.split_stride = at.widths[source] * at.ranks[source];
  STD_TORCH_CHECK(sum ? grad.dim() == 1 && grad.size(0) == outs
                      : grad.dim() == 2 && grad.size(down ? 1 : 0) == job.rows &&
                            grad.size(down ? 0 : 1) == job.cols,
                  "gated_bottleneck_bwd_weights: gradient ", j, ": want ", job.rows, " x ",
                  job.cols);
  job.out = grad.data_ptr();
  job.dtype = dtype_of(grad, "gated_bottleneck_bwd_weights: gradient");
  job.stride_row = sum ? 0 : grad.stride(down ? 1 : 0);
  job.stride_col = grad.stride(sum || down ? 0 : 1);
  return job;
}

void gated_bottleneck_bwd_weights(Tensor dout, MaybeTensors tensors, MaybeTensors work,
                                  MaybeTensors grads, MaybeTensor rng, std::vector<int64_t> codes,
                                  std::vector<double> numbers, int64_t splits) {
  STD_TORCH_CHECK(splits >= 1 && grads.size() == kMaxReduces,
                  "gated_bottleneck_bwd_weights: want a split and ", kMaxReduces, " gradients");
  const Call call{tensors, work, rng, gated_settings(codes, numbers)};
  GatedWeightsParams p = weights_params(call, dout, grads);
  p.splits = splits;
  const Partials at = partials_of(p);
  Tensor partial = torch::stable::new_empty(dout, {at.first[kMatrices + 1]}, ScalarType::Float);
  float* const data = static_cast<float*>(partial.data_ptr());
  p.partial_up = data;
  p.partial_gate_up = data + at.first[1];
  p.down[0].partial = data + at.first[2];
  p.down[1].partial = data + at.first[3];
  p.partial_sums = data + at.first[4];
  GatedReduceParams reduce = {};
  reduce.splits = splits;
  for (int j = 0; j < kMaxReduces; ++j) {
    if (!grads[j].has_value() || at.widths[j < kMatrices ? j : kMatrices] == 0) continue;
    reduce.job[reduce.jobs++] = reduce_of(*grads[j], j, at, data, p.f.outs);
  }
  const Device device(dout);
  check_launch(launch_gated_bottleneck_bwd_weights(p, device.stream()),
               "gated_bottleneck_bwd_weights");
  check_launch(launch_gated_bottleneck_bwd_reduce(reduce, device.stream()),
               "gated_bottleneck_bwd_weights");
}

// What the largest block asks for: sm_80, sm_90 and sm_100 have it for every rank.
int64_t gated_bottleneck_shared_bytes(Tensor like, int64_t rank, int64_t gate_rank) {
  const DType dtype = dtype_of(like, "gated_bottleneck_shared_bytes");
  size_t most = 0;
  for (const auto bytes : {gated_bottleneck_fwd_bytes, gated_bottleneck_bwd_rows_bytes,
                           gated_bottleneck_bwd_weights_bytes}) {
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
