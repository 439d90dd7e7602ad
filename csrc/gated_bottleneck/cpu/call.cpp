// gated_bottleneck on the CPU: checks, packing of the weights, row blocks to threads, registration.
#include "params.h"

#include "common/cpu/pack.h"

namespace petal {
namespace {

using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;
using Optionals = std::vector<Optional>;

const GatedKernels& kernels() {
  switch (current_isa()) {
#if defined(PETAL_BUILT_AVX512)
    case Isa::kAvx512: return avx512::gated_kernels();
#endif
#if defined(PETAL_BUILT_AVX2)
    case Isa::kAvx2: return avx2::gated_kernels();
#endif
    default: return generic::gated_kernels();
  }
}

// The tensor arguments, in the order of arguments.py; gradients come in the same order.
enum Name {
  kX,
  kDown,
  kDownBias,
  kBottleneck,
  kUp,
  kUpBias,
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
  kNormWeight,
  kNormBias,
  kNames
};
const char* const kNameOf[kNames] = {
    "x",         "down",           "down_bias", "bottleneck",   "up",
    "up_bias",   "base",           "left",      "right",        "gate_input",
    "gate_down", "gate_down_bias", "gate_up",   "gate_up_bias", "gate_weight",
    "gate_bias", "token_weights",  "residual",  "norm_weight",  "norm_bias"};
// What the caller derives from them: G of middleY, and for logits U^T w_h where they read Y and the
// bias.
enum Derived { kChannel, kWeightA, kLogitBias, kDerived };

constexpr int64_t kBlockBytes = 640 << 10;  // of wide blocks: L2 holds them and a panel of weights
constexpr int64_t kBlockRows = 120;
constexpr int64_t kLeastRows = 24;
constexpr int64_t kSampleRows = 128;  // a sample of gate small up to this long is one block
constexpr int64_t kSplitRows = 512;   // rows that share one partial of each weight gradient
constexpr int64_t kSplitStep = 4;     // splits come in multiples: a few threads finish together
constexpr int64_t kMaxSplits = 64;
constexpr int64_t kSerialWork = 1 << 20;  // multiply-adds below which threads do not pay

bool worth_threads(const GatedArgs& a) {
  return a.N * (a.R + a.Rg) * (a.D + a.O + a.Dg) > kSerialWork;
}

// Rows of a block with `wide` columns of fp32 per row. Samples of gate small stay whole where they
// are not much longer: the alternative is to walk them twice.
int64_t block_rows(const GatedArgs& a, const CpuOperands& operands, int64_t wide) {
  const int64_t rows = std::clamp<int64_t>(kBlockBytes / 4 / wide, kLeastRows, kBlockRows);
  if (a.gate == Gate::kSmall && a.L > rows && a.L <= kSampleRows) return a.L;
  return rows / operands.tile_rows * operands.tile_rows;
}

float* floats(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(dtype_of(t, name) == DType::kFloat32 && t.is_contiguous(), name,
                  ": want contiguous float32");
  return static_cast<float*>(const_cast<void*>(t.const_data_ptr()));
}

// One call's arguments and the operands to be packed for it, which point into the arguments.
struct Call {
  const Optionals& tensors;
  GatedArgs a = {};
  Packer packer;

  // What forward and backward have in common; `like` is a row tensor.
  Call(const Optionals& given, const Optionals& derived, const Optional& rng, const Tensor& like,
       int64_t activation, int64_t route, bool route_relu, int64_t gate, bool sees_output,
       bool add_input, bool add_gate_input, int64_t samples, double scale, double eps,
       int64_t threshold, double keep_scale)
      : tensors(given) {
    STD_TORCH_CHECK(given.size() == kNames && derived.size() == kDerived && given[kUp],
                    "tensors: want ", static_cast<int>(kNames), ", among them up");
    a.type = dtype_of(like, "x"), a.N = like.size(0);
    a.O = given[kUp]->size(0), a.R = given[kUp]->size(1);
    a.D = given[kDown] ? given[kDown]->size(1) : a.O;
    a.Dg = given[kGateDown] ? given[kGateDown]->size(1) : a.O;
    if (given[kGateDown]) a.Rg = given[kGateDown]->size(0);
    if (given[kLeft]) a.V = given[kLeft]->size(1);
    a.L = a.N / std::max<int64_t>(samples, 1);
    STD_TORCH_CHECK(a.L * samples == a.N, "samples: ", samples, " do not divide ", a.N, " rows");
    a.activation = static_cast<Activation>(activation), a.route = static_cast<Route>(route);
    a.gate = static_cast<Gate>(gate), a.route_relu = route_relu, a.sees_output = sees_output;
    a.add_input = add_input, a.add_gate_input = add_gate_input;
    a.z_given = given[kBottleneck].has_value();
    a.scale = static_cast<float>(scale), a.eps = static_cast<float>(eps);
    a.dropout = cpu_dropout(rng, threshold, keep_scale);
    rows(a.x, kX, a.D);
    rows(a.base, kBase, a.O);
    rows(a.gate_input, kGateInput, a.Dg);
    rows(a.residual, kResidual, a.O);
    a.left = per_sample(kLeft), a.right = per_sample(kRight);
    if (given[kTokenWeights]) a.token_weights = floats(*given[kTokenWeights], "token_weights");
    packer.add(&a.up_t, matrix(*given[kUp], "up").transposed());
    if (given[kGateUp]) packer.add(&a.gate_up_t, matrix(*given[kGateUp], "gate_up").transposed());
    vector(&a.up_bias, kUpBias, a.O);
    vector(&a.gate_up_bias, kGateUpBias, a.O);
    vector(&a.channel, derived[kChannel], "channel", 0, a.O);
    if (has_logits()) {
      vector(&a.weight_x, kGateWeight, a.O);
      vector(&a.weight_h, given[kGateWeight], "gate_weight", a.gate == Gate::kSmall ? a.O : 0, a.O);
    }
    vector(&a.norm_weight, kNormWeight, a.O);
    vector(&a.norm_bias, kNormBias, a.O);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  bool has_logits() const { return a.gate == Gate::kMiddleX || a.gate == Gate::kSmall; }
  CpuRows rows(const Tensor& t, const char* name, int64_t width) const {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == a.N && t.size(1) == width, name, ": want [", a.N,
                    ", ", width, "]");
    STD_TORCH_CHECK(dtype_of(t, name) == a.type, name, ": its dtype differs from the activations'");
    return {const_cast<void*>(t.const_data_ptr()), row_stride(t, name)};
  }
  void rows(CpuRows& to, Name name, int64_t width) const {
    if (tensors[name]) to = rows(*tensors[name], kNameOf[name], width);
  }
  void vector(const float** to, const Optional& t, const char* name, int64_t begin, int64_t width) {
    if (!t) return;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) >= begin + width, name, ": want [", begin + width,
                    "]");
    const DType type = dtype_of(*t, name);
    char* data = static_cast<char*>(const_cast<void*>(t->const_data_ptr()));
    data += begin * t->stride(0) * static_cast<int64_t>(type_bytes(type));
    packer.add(to, {data, type, 1, width, 0, t->stride(0)});
  }
  void vector(const float** to, Name name, int64_t width) {
    vector(to, tensors[name], kNameOf[name], 0, width);
  }
  const void* per_sample(Name name) const {
    const Optional& t = tensors[name];
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->dim() == 3 && t->size(0) * a.L == a.N && t->size(1) == a.V &&
                        t->size(2) == a.R && t->is_contiguous() &&
                        dtype_of(*t, kNameOf[name]) == a.type,
                    kNameOf[name], ": want [B, V, R], contiguous, in the activations' dtype");
    return t->const_data_ptr();
  }
};

// results: out, z, zg, logits, moments; those that this call does not have are empty.
void forward(Optionals tensors, Optionals derived, Optional rng, int64_t activation, int64_t route,
             bool route_relu, int64_t gate, bool sees_output, bool add_input, bool add_gate_input,
             int64_t samples, double scale, double eps, int64_t threshold, double keep_scale,
             Tensors results) {
  const GatedKernels& kernel = kernels();
  STD_TORCH_CHECK(results.size() == 5, "results: want five");
  Call c(tensors, derived, rng, results[0], activation, route, route_relu, gate, sees_output,
         add_input, add_gate_input, samples, scale, eps, threshold, keep_scale);
  GatedArgs& a = c.a;
  a.out = c.rows(results[0], "out", a.O);
  if (a.z_given) {
    c.rows(a.z, kBottleneck, a.R);
  } else {
    a.z = c.rows(results[1], "z", a.R);
    c.packer.add(&a.down_t, matrix(*tensors[kDown], "down").transposed());
    c.vector(&a.down_bias, kDownBias, a.R);
  }
  if (a.Rg) {
    a.zg = c.rows(results[2], "zg", a.Rg);
    c.packer.add(&a.gate_down_t, matrix(*tensors[kGateDown], "gate_down").transposed());
    c.vector(&a.gate_down_bias, kGateDownBias, a.Rg);
  }
  c.vector(&a.weight_a, derived[kWeightA], "weight_a", 0, a.R);
  c.vector(&a.logit_bias, derived[kLogitBias], "logit_bias", 0, 1);
  if (c.has_logits()) a.logits = floats(results[3], "logits");
  if (tensors[kNormWeight]) a.moments = floats(results[4], "moments");
  const bool parallel = worth_threads(a);
  const int64_t second = a.gate_input.p || a.residual.p ? std::max(a.Dg, a.O) : 0;
  a.block = block_rows(a, kernel.operands, std::max(a.D, a.O) + second);
  int64_t step = a.block;
  if (a.gate == Gate::kSmall) step = a.L > a.block ? a.L : a.block / a.L * a.L;
  Scratch packed(c.packer.floats(kernel.operands.panel));
  c.packer.run(packed.data(), kernel.operands, parallel);
  run_tasks(ceil_div(a.N, step), parallel, [&](const auto& next) {
    int64_t i = next();
    if (i < 0) return;
    Scratch scratch(kernel.forward_scratch(a));
    for (; i >= 0; i = next()) {
      kernel.forward(a, i * step, std::min(a.N, (i + 1) * step), scratch.data());
    }
  });
}

// Partials of every weight and vector gradient that is wanted.
void add_gradients(Gradients& gradients, GatedArgs& a, const Tensors& grads) {
  const auto matrix_of = [&](float** partials, Name name, bool transposed) {
    if (grads[name].numel() == 0) return;
    const Matrix m = matrix(grads[name], kNameOf[name]);
    gradients.add(partials, transposed ? m.transposed() : m);
  };
  const auto vector_of = [&](float** partials, Name name, int64_t row = 0) {
    const Tensor& t = grads[name];
    if (t.numel() == 0) return;
    const int64_t width = t.size(t.dim() - 1);
    char* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    data += row * width * static_cast<int64_t>(type_bytes(dtype_of(t, kNameOf[name])));
    gradients.add(partials, {data, dtype_of(t, kNameOf[name]), 1, width, 0, 1});
  };
  matrix_of(&a.ddown, kDown, false);
  matrix_of(&a.dup_t, kUp, true);
  matrix_of(&a.dgate_down, kGateDown, false);
  matrix_of(&a.dgate_up_t, kGateUp, true);
  vector_of(&a.ddown_bias, kDownBias);
  vector_of(&a.dup_bias, kUpBias);
  vector_of(&a.dgate_down_bias, kGateDownBias);
  vector_of(&a.dgate_up_bias, kGateUpBias);
  vector_of(&a.dlogit_bias, kGateBias);
  vector_of(&a.dnorm_weight, kNormWeight);
  vector_of(&a.dnorm_bias, kNormBias);
  if (a.gate == Gate::kMiddleY) {
    vector_of(&a.dchannel, kGateWeight);
  } else if (a.gate != Gate::kLarge) {
    vector_of(&a.dweight_x, kGateWeight);
    if (a.sees_output || a.add_input || a.base.p) vector_of(&a.dweight_h, kGateWeight, 1);
  }
}

// saved: z, zg, logits, moments, or empty. grads: in the order of the tensors, empty where not
// wanted; gate_weight's is fp32: [O] (middleY, with respect to G) or [2, O] (of X and of what the
// logit sees).
void backward(Optionals tensors, Optionals derived, Optional rng, int64_t activation, int64_t route,
              bool route_relu, int64_t gate, bool sees_output, bool add_input, bool add_gate_input,
              int64_t samples, double scale, double eps, int64_t threshold, double keep_scale,
              Tensor dout, Tensors saved, Tensors grads) {
  const GatedKernels& kernel = kernels();
  STD_TORCH_CHECK(saved.size() == 4 && grads.size() == kNames, "want four saved tensors and ",
                  static_cast<int>(kNames), " gradients");
  Call c(tensors, derived, rng, dout, activation, route, route_relu, gate, sees_output, add_input,
         add_gate_input, samples, scale, eps, threshold, keep_scale);
  GatedArgs& a = c.a;
  a.dout = c.rows(dout, "dout", a.O);
  a.z = c.rows(a.z_given ? *tensors[kBottleneck] : saved[0], "z", a.R);
  if (a.Rg) a.zg = c.rows(saved[1], "zg", a.Rg);
  if (saved[2].numel()) a.logits = floats(saved[2], "logits");
  if (saved[3].numel()) a.moments = floats(saved[3], "moments");
  const auto result = [&](CpuRows& to, Name name, int64_t width) {
    if (grads[name].numel()) to = c.rows(grads[name], kNameOf[name], width);
  };
  result(a.dx, kX, a.D);
  result(a.dbase, kBase, a.O);
  result(a.dgate_input, kGateInput, a.Dg);
  result(a.dresidual, kResidual, a.O);
  result(a.dz, kBottleneck, a.R);
  if (grads[kLeft].numel()) a.dleft = grads[kLeft].mutable_data_ptr();
  if (grads[kRight].numel()) a.dright = grads[kRight].mutable_data_ptr();
  const auto wanted = [&](Name name) { return grads[name].numel() > 0; };
  const bool through = wanted(kX) && tensors[kDown], through_gate = wanted(kGateInput) && a.Rg;
  a.need_dz = through || wanted(kDown) || wanted(kDownBias) || a.dz.p || a.dleft || a.dright;
  a.need_dzg = through_gate || wanted(kGateDown) || wanted(kGateDownBias);
  if (a.need_dz) c.packer.add(&a.up, matrix(*tensors[kUp], "up"));
  if (a.need_dzg) c.packer.add(&a.gate_up, matrix(*tensors[kGateUp], "gate_up"));
  if (through) c.packer.add(&a.down, matrix(*tensors[kDown], "down"));
  if (through_gate) c.packer.add(&a.gate_down, matrix(*tensors[kGateDown], "gate_down"));
  // Splits of whole units: rows, or samples where sums over them are wanted.
  const int64_t unit = a.gate == Gate::kSmall || a.route != Route::kNone ? a.L : 1;
  const int64_t wish = ceil_div(a.N, kSplitRows * kSplitStep) * kSplitStep;
  const int64_t most = std::clamp<int64_t>(a.N / kLeastRows, 1, kMaxSplits);
  const int64_t split_rows = ceil_div(a.N / unit, std::min(wish, most)) * unit;
  const int64_t splits = ceil_div(a.N, split_rows);
  Gradients gradients(splits, kernel.operands.panel);
  add_gradients(gradients, a, grads);
  const int64_t packed = c.packer.floats(kernel.operands.panel);
  Scratch work(packed + gradients.floats());
  gradients.place(work.data() + packed);
  const bool parallel = worth_threads(a);
  a.block = block_rows(a, kernel.operands, std::max({a.O, a.D, a.Dg}) + 3 * a.O);
  c.packer.run(work.data(), kernel.operands, parallel);
  run_tasks(splits, parallel, [&](const auto& next) {
    int64_t s = next();
    if (s < 0) return;
    Scratch scratch(kernel.backward_scratch(a));
    for (; s >= 0; s = next()) {
      kernel.backward(a, s, s * split_rows, std::min(a.N, (s + 1) * split_rows), scratch.data());
    }
  });
  gradients.reduce(kernel.operands, parallel);
}

#define PETAL_GATED_SETTINGS                                                           \
  "Tensor?[] tensors, Tensor?[] derived, Tensor? rng, int activation, int route, "     \
  "bool route_relu, int gate, bool sees_output, bool add_input, bool add_gate_input, " \
  "int samples, float scale, float eps, int threshold, float keep_scale, "

}  // namespace
}  // namespace petal

STABLE_TORCH_LIBRARY_FRAGMENT(petal_native, m) {
  m.def("gated_bottleneck_fwd(" PETAL_GATED_SETTINGS "Tensor(a!)[] results) -> ()");
  m.def("gated_bottleneck_bwd(" PETAL_GATED_SETTINGS
        "Tensor dout, Tensor[] saved, Tensor(a!)[] grads) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(petal_native, CPU, m) {
  m.impl("gated_bottleneck_fwd", TORCH_BOX(&petal::forward));
  m.impl("gated_bottleneck_bwd", TORCH_BOX(&petal::backward));
}
