// Host side of gated_bottleneck on CUDA: one call's checked arguments as the kernels' parameters.
#pragma once

#include "common/cuda/host.h"
#include "gated_bottleneck/arguments.h"
#include "params.h"

namespace petal {
namespace {

// The fields of cuda_impl.Work.
enum Work {
  kZ,
  kZg,
  kLogits,
  kPooled,
  kMoments,
  kWeightA,
  kSums,
  kTotals,
  kA,
  kAg,
  kDz,
  kDzg,
  kDq,
  kDu,
  kDh,
  kDgateInput,
  kDx,
  kWork
};

struct Call {
  const MaybeTensors &tensors, &work;
  const MaybeTensor& rng;
  GatedSettings settings;
};

int64_t size(const MaybeTensor& tensor, int64_t dim, const char* name) {
  STD_TORCH_CHECK(tensor.has_value() && tensor->dim() == 2, name, ": want a matrix");
  return tensor->size(dim);
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

// The two bottlenecks, what the route multiplies with, and the up-projections.
void add_products(GatedParams& p, const Call& call) {
  const MaybeTensors &t = call.tensors, &w = call.work;
  const DType dtype = p.dtype;
  p.outs = size(t[Input::kUp], 0, "up");
  p.down.rank = static_cast<int32_t>(size(t[Input::kUp], 1, "up"));
  p.up = view(t[Input::kUp], dtype, p.outs, p.down.rank, "up");
  p.down.z = view(w[kZ], dtype, p.rows, p.down.rank, "z");
  if (t[Input::kDown].has_value()) {
    p.down.width = size(t[Input::kDown], 1, "down");
    p.down.weight = view(t[Input::kDown], dtype, p.down.rank, p.down.width, "down");
    p.down.bias = vector(t[Input::kDownBias], dtype, p.down.rank, "down_bias");
    p.down.in = view(t[Input::kX], dtype, p.rows, p.down.width, "x");
  }
  if (p.kind == Gate::kLarge) {
    p.gate.rank = static_cast<int32_t>(size(t[Input::kGateUp], 1, "gate_up"));
    p.gate.width = size(t[Input::kGateDown], 1, "gate_down");
    p.gate_up = view(t[Input::kGateUp], dtype, p.outs, p.gate.rank, "gate_up");
    p.gate.weight = view(t[Input::kGateDown], dtype, p.gate.rank, p.gate.width, "gate_down");
    p.gate.bias = vector(t[Input::kGateDownBias], dtype, p.gate.rank, "gate_down_bias");
    p.gate.in = view(t[Input::kGateInput], dtype, p.rows, p.gate.width, "gate_input");
    p.gate.z = view(w[kZg], dtype, p.rows, p.gate.rank, "zg");
  }
  for (const int32_t rank : {p.down.rank, p.gate.rank})
    STD_TORCH_CHECK(rank <= kMaxGatedRank, "gated_bottleneck: want ranks of at most ",
                    kMaxGatedRank, ", got ", rank);
  const int64_t samples = call.settings.samples;
  if (p.route != Route::kNone)
    p.left = needed(t[Input::kLeft], dtype, samples, p.down.rank, "left");
  if (p.route == Route::kProduct)
    p.right = needed(t[Input::kRight], dtype, samples, p.down.rank, "right");
}

// The vectors over the output columns, and what a row gate reads and keeps.
void add_columns(GatedParams& p, const Call& call) {
  const MaybeTensors &t = call.tensors, &w = call.work;
  const DType dtype = p.dtype;
  const MaybeTensor& weight = t[Input::kGateWeight];
  p.columns[kUpBias] = vector(t[Input::kUpBias], dtype, p.outs, "up_bias");
  p.columns[kNormWeight] = vector(t[Input::kNormWeight], dtype, p.outs, "norm_weight");
  p.columns[kNormBias] = vector(t[Input::kNormBias], dtype, p.outs, "norm_bias");
  if (p.kind == Gate::kLarge)
    p.columns[kGateColumn] = vector(t[Input::kGateUpBias], dtype, p.outs, "gate_up_bias");
  if (p.kind == Gate::kMiddleY)
    p.columns[kGateColumn] = vector(weight, dtype, p.outs, "gate_weight");
  if (!call.settings.row_gate) return;
  const bool pair = p.kind == Gate::kSmall;
  const int64_t count = pair ? 2 * p.outs : p.outs;
  want(weight.has_value(), "gate_weight");
  p.columns[kInputWeight] = vector(weight, dtype, count, "gate_weight");
  p.columns[kLogitHWeight] = vector(weight, dtype, count, "gate_weight", pair ? p.outs : 0);
  p.gate_bias = vector(t[Input::kGateBias], dtype, 1, "gate_bias");
  p.logits = floats(w[kLogits], p.rows, "logits");
  p.pooled = floats(w[kPooled], call.settings.samples, "pooled");
  p.weight_a = floats(w[kWeightA], p.down.rank, "weight_a");
}

GatedParams params_of(const Call& call, DType dtype, int64_t rows) {
  STD_TORCH_CHECK(call.tensors.size() == Input::kCount && call.work.size() == kWork,
                  "gated_bottleneck: a list of another length");
  const MaybeTensors& t = call.tensors;
  const GatedSettings& s = call.settings;
  STD_TORCH_CHECK(s.samples >= 1 && rows % s.samples == 0, "samples: want a divisor of ", rows,
                  ", got ", s.samples);
  GatedParams p = {};
  p.dtype = dtype;
  p.rows = rows;
  p.length = rows / s.samples;
  p.kind = s.gate;
  p.activation = s.activation;
  p.route = s.route;
  p.route_relu = s.route_relu;
  p.gate_linear = s.gate_linear;
  p.adds_gate_input = s.add_gate_input;
  p.sees_output = s.sees_output;
  p.scale = s.scale;
  p.eps = s.eps;
  p.dropout = dropout_of(call.rng, s.dropout);
  add_products(p, call);
  if (s.row_gate || s.add_gate_input)
    p.gate_input = view(t[Input::kGateInput], dtype, rows, p.outs, "gate_input");
  p.h = view(t[s.add_input ? Input::kX : Input::kBase], dtype, rows, p.outs, "base");
  p.residual =
      s.add_gate_input ? p.gate_input : view(t[Input::kResidual], dtype, rows, p.outs, "residual");
  add_columns(p, call);
  p.moments = floats(call.work[kMoments], 2 * rows, "moments");
  return p;
}

// What forward has left.
void check_saved(const GatedParams& f) {
  want(f.kind != Gate::kLarge || f.gate.z.data != nullptr, "zg");
  want((f.kind != Gate::kMiddleX && f.kind != Gate::kSmall) || f.logits != nullptr, "logits");
  want(f.kind != Gate::kSmall || f.pooled != nullptr, "pooled");
  want(f.columns[kNormWeight].data == nullptr || f.moments != nullptr, "moments");
}

}  // namespace
}  // namespace petal
