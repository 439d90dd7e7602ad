// Host side of expert_dispatch on CUDA: one call's checked arguments as the kernels' parameters.
#pragma once

#include "common/cuda/host.h"
#include "expert_dispatch/arguments.h"
#include "params.h"

namespace petal {
namespace {

// The fields of cuda_impl.Work.
enum Work {
  kZ,
  kLogits,
  kChosen,
  kOrder,
  kOffsets,
  kInverse,
  kOut,
  kDz,
  kGa,
  kDx,
  kDgates,
  kGates,
  kDlogits,
  kWork
};

struct Call {
  const MaybeTensors &tensors, &work;
  ExpertSettings settings;
};

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

// Gates and choice, and the router that forms them.
void add_gates(ExpertParams& p, const Call& call) {
  const MaybeTensors &t = call.tensors, &w = call.work;
  const int64_t experts = p.experts, gate_rows = p.rows / p.tokens_per_gate;
  if (p.gate == ExpertGate::kSoftmax || p.gate == ExpertGate::kTopK) {
    STD_TORCH_CHECK(p.tokens_per_gate == 1, "tokens_per_gate: want 1 with a router, got ",
                    p.tokens_per_gate);
    p.router = vector(t[Input::kRouter], p.dtype, experts * p.width, "router");
    p.router_bias = vector(t[Input::kRouterBias], p.dtype, experts, "router_bias");
    p.noise = vector(t[Input::kNoise], p.dtype, p.rows * experts, "noise");
    p.logits = floats(w[kLogits], p.rows * experts, "logits");
    want(p.logits != nullptr, "logits");
  }
  if (p.gate == ExpertGate::kGiven) {
    want(t[Input::kGates].has_value(), "gates");
    p.gates = vector(t[Input::kGates], p.dtype, gate_rows * experts, "gates");
  }
  const bool topk = p.gate == ExpertGate::kTopK;
  p.chosen = elements<uint8_t>(topk ? w[kChosen] : t[Input::kChosen], ScalarType::Bool,
                               gate_rows * experts, "chosen");
  want(!topk || p.chosen != nullptr, "chosen");
}

// The row tensors' widths come from the weights: down [E r or r, D], up [O, E r].
ExpertParams params_of(const Call& call, DType dtype, int64_t rows) {
  STD_TORCH_CHECK(call.tensors.size() == Input::kCount && call.work.size() == kWork,
                  "expert_dispatch: a list of another length");
  const MaybeTensors &t = call.tensors, &w = call.work;
  const ExpertSettings& s = call.settings;
  STD_TORCH_CHECK(s.experts >= 1 && s.experts <= kMaxExperts, "experts: want 1 to ", kMaxExperts,
                  ", got ", s.experts);
  STD_TORCH_CHECK(s.rank >= 1 && s.rank <= kMaxExpertRank, "rank: want 1 to ", kMaxExpertRank,
                  ", got ", s.rank);
  STD_TORCH_CHECK(s.top_k >= 0 && s.top_k <= s.experts, "top_k: want at most ", s.experts, ", got ",
                  s.top_k);
  STD_TORCH_CHECK(s.tokens_per_gate >= 1 && rows % s.tokens_per_gate == 0,
                  "tokens_per_gate: want a divisor of ", rows, ", got ", s.tokens_per_gate);
  want(t[Input::kDown].has_value() && t[Input::kDown]->dim() == 2, "down");
  want(t[Input::kUp].has_value() && t[Input::kUp]->dim() == 2, "up");
  const int64_t inner = s.experts * s.rank;
  ExpertParams p = {};
  p.dtype = dtype;
  p.rows = rows;
  p.experts = static_cast<int32_t>(s.experts);
  p.rank = static_cast<int32_t>(s.rank);
  p.top_k = static_cast<int32_t>(s.top_k);
  p.activation = s.activation;
  p.gate = s.gate;
  p.renormalize = s.renormalize;
  p.tokens_per_gate = s.tokens_per_gate;
  p.shared = s.shared_down;
  p.keep = s.keep;
  p.mix = s.mix;
  p.width = t[Input::kDown]->size(1);
  p.outs = t[Input::kUp]->size(0);
  p.x = view(t[Input::kX], dtype, rows, p.width, "x");
  p.up = view(t[Input::kUp], dtype, p.outs, inner, "up");
  p.up_bias = vector(t[Input::kUpBias], dtype, p.outs * s.experts, "up_bias");
  add_gates(p, call);
  if (w[kOrder].has_value()) {
    p.slots = w[kOrder]->numel();
    p.order = ints(w[kOrder], p.slots, "order");
    p.offsets = ints(w[kOffsets], s.experts + 1, "offsets");
    p.inverse = ints(w[kInverse], rows * s.experts, "inverse");
    want(p.offsets != nullptr && p.inverse != nullptr, "offsets and inverse");
  }
  const bool sorted = p.order != nullptr;
  p.z = view(w[kZ], dtype, sorted ? p.slots : rows, sorted || p.shared ? p.rank : inner, "z");
  return p;
}

}  // namespace
}  // namespace petal
