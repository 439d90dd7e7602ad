// gated_bottleneck on the CPU: checks, packing of the weights, row blocks to threads, registration.
#include "common/cpu/pack.h"
#include "gated_bottleneck/arguments.h"
#include "params.h"

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

const char* const kNameOf[Input::kCount] = {
    "x",         "down",           "down_bias", "bottleneck",   "up",
    "up_bias",   "base",           "left",      "right",        "gate_input",
    "gate_down", "gate_down_bias", "gate_up",   "gate_up_bias", "gate_weight",
    "gate_bias", "token_weights",  "residual",  "norm_weight",  "norm_bias"};
// What the caller derives from the tensors: G of middleY, and for logits up^T w_h where they read Y
// and the bias.
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
       const GatedSettings& s)
      : tensors(given) {
    STD_TORCH_CHECK(
        given.size() == Input::kCount && derived.size() == kDerived && given[Input::kUp],
        "tensors: want ", static_cast<int>(Input::kCount), ", among them up");
    a.type = dtype_of(like, "x"), a.N = like.size(0);
    a.O = given[Input::kUp]->size(0), a.R = given[Input::kUp]->size(1);
    a.D = given[Input::kDown] ? given[Input::kDown]->size(1) : a.O;
    a.Dg = given[Input::kGateDown] ? given[Input::kGateDown]->size(1) : a.O;
    if (given[Input::kGateDown]) a.Rg = given[Input::kGateDown]->size(0);
    if (given[Input::kLeft]) a.V = given[Input::kLeft]->size(1);
    a.L = a.N / std::max<int64_t>(s.samples, 1);
    STD_TORCH_CHECK(a.L * s.samples == a.N, "samples: ", s.samples, " do not divide ", a.N,
                    " rows");
    a.activation = s.activation, a.route = s.route, a.route_relu = s.route_relu;
    a.gate = s.gate, a.sees_output = s.sees_output;
    a.add_input = s.add_input, a.add_gate_input = s.add_gate_input;
    a.z_given = given[Input::kBottleneck].has_value();
    a.scale = s.scale, a.eps = s.eps;
    a.dropout = cpu_dropout(rng, s.dropout);
    rows(a.x, Input::kX, a.D);
    rows(a.base, Input::kBase, a.O);
    rows(a.gate_input, Input::kGateInput, a.Dg);
    rows(a.residual, Input::kResidual, a.O);
    a.left = per_sample(Input::kLeft), a.right = per_sample(Input::kRight);
    if (given[Input::kTokenWeights])
      a.token_weights = floats(*given[Input::kTokenWeights], "token_weights");
    packer.add(&a.up_t, matrix(*given[Input::kUp], "up").transposed());
    if (given[Input::kGateUp])
      packer.add(&a.gate_up_t, matrix(*given[Input::kGateUp], "gate_up").transposed());
    vector(&a.up_bias, Input::kUpBias, a.O);
    vector(&a.gate_up_bias, Input::kGateUpBias, a.O);
    vector(&a.channel, derived[kChannel], "channel", 0, a.O);
    if (has_logits()) {
      vector(&a.weight_x, Input::kGateWeight, a.O);
      vector(&a.weight_h, given[Input::kGateWeight], "gate_weight",
             a.gate == Gate::kSmall ? a.O : 0, a.O);
    }
    vector(&a.norm_weight, Input::kNormWeight, a.O);
    vector(&a.norm_bias, Input::kNormBias, a.O);
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
  void rows(CpuRows& to, Input::Name name, int64_t width) const {
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
  void vector(const float** to, Input::Name name, int64_t width) {
    vector(to, tensors[name], kNameOf[name], 0, width);
  }
  const void* per_sample(Input::Name name) const {
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
void forward(Optionals tensors, Optionals derived, Optional rng, std::vector<int64_t> codes,
             std::vector<double> numbers, Tensors results) {
  const GatedKernels& kernel = kernels();
  STD_TORCH_CHECK(results.size() == 5, "results: want five");
  Call c(tensors, derived, rng, results[0], gated_settings(codes, numbers));
  GatedArgs& a = c.a;
  a.out = c.rows(results[0], "out", a.O);
  if (a.z_given) {
    c.rows(a.z, Input::kBottleneck, a.R);
  } else {
    a.z = c.rows(results[1], "z", a.R);
    c.packer.add(&a.down_t, matrix(*tensors[Input::kDown], "down").transposed());
    c.vector(&a.down_bias, Input::kDownBias, a.R);
  }
  if (a.Rg) {
    a.zg = c.rows(results[2], "zg", a.Rg);
    c.packer.add(&a.gate_down_t, matrix(*tensors[Input::kGateDown], "gate_down").transposed());
    c.vector(&a.gate_down_bias, Input::kGateDownBias, a.Rg);
  }
  c.vector(&a.weight_a, derived[kWeightA], "weight_a", 0, a.R);
  c.vector(&a.logit_bias, derived[kLogitBias], "logit_bias", 0, 1);
  if (c.has_logits()) a.logits = floats(results[3], "logits");
  if (tensors[Input::kNormWeight]) a.moments = floats(results[4], "moments");
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
  const auto matrix_of = [&](float** partials, Input::Name name, bool transposed) {
    if (grads[name].numel() == 0) return;
    const Matrix m = matrix(grads[name], kNameOf[name]);
    gradients.add(partials, transposed ? m.transposed() : m);
  };
  const auto vector_of = [&](float** partials, Input::Name name, int64_t row = 0) {
    const Tensor& t = grads[name];
    if (t.numel() == 0) return;
    const int64_t width = t.size(t.dim() - 1);
    char* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    data += row * width * static_cast<int64_t>(type_bytes(dtype_of(t, kNameOf[name])));
    gradients.add(partials, {data, dtype_of(t, kNameOf[name]), 1, width, 0, 1});
  };
  matrix_of(&a.ddown, Input::kDown, false);
  matrix_of(&a.dup_t, Input::kUp, true);
  matrix_of(&a.dgate_down, Input::kGateDown, false);
  matrix_of(&a.dgate_up_t, Input::kGateUp, true);
  vector_of(&a.ddown_bias, Input::kDownBias);
  vector_of(&a.dup_bias, Input::kUpBias);
  vector_of(&a.dgate_down_bias, Input::kGateDownBias);
  vector_of(&a.dgate_up_bias, Input::kGateUpBias);
  vector_of(&a.dlogit_bias, Input::kGateBias);
  vector_of(&a.dnorm_weight, Input::kNormWeight);
  vector_of(&a.dnorm_bias, Input::kNormBias);
  if (a.gate == Gate::kMiddleY) {
    vector_of(&a.dchannel, Input::kGateWeight);
  } else if (a.gate != Gate::kLarge) {
    vector_of(&a.dweight_x, Input::kGateWeight);
    if (a.sees_output || a.add_input || a.base.p) vector_of(&a.dweight_h, Input::kGateWeight, 1);
  }
}

// saved: z, zg, logits, moments, or empty. grads: in the order of the tensors, empty where not
// wanted; gate_weight's is fp32: [O] (middleY, with respect to G) or [2, O] (of gate_input and of
// what the logit sees).
void backward(Optionals tensors, Optionals derived, Optional rng, std::vector<int64_t> codes,
              std::vector<double> numbers, Tensor dout, Tensors saved, Tensors grads) {
  const GatedKernels& kernel = kernels();
  STD_TORCH_CHECK(saved.size() == 4 && grads.size() == Input::kCount,
                  "want four saved tensors and ", static_cast<int>(Input::kCount), " gradients");
  Call c(tensors, derived, rng, dout, gated_settings(codes, numbers));
  GatedArgs& a = c.a;
  a.dout = c.rows(dout, "dout", a.O);
  a.z = c.rows(a.z_given ? *tensors[Input::kBottleneck] : saved[0], "z", a.R);
  if (a.Rg) a.zg = c.rows(saved[1], "zg", a.Rg);
  if (saved[2].numel()) a.logits = floats(saved[2], "logits");
  if (saved[3].numel()) a.moments = floats(saved[3], "moments");
  const auto result = [&](CpuRows& to, Input::Name name, int64_t width) {
    if (grads[name].numel()) to = c.rows(grads[name], kNameOf[name], width);
  };
  result(a.dx, Input::kX, a.D);
  result(a.dbase, Input::kBase, a.O);
  result(a.dgate_input, Input::kGateInput, a.Dg);
  result(a.dresidual, Input::kResidual, a.O);
  result(a.dz, Input::kBottleneck, a.R);
  if (grads[Input::kLeft].numel()) a.dleft = grads[Input::kLeft].mutable_data_ptr();
  if (grads[Input::kRight].numel()) a.dright = grads[Input::kRight].mutable_data_ptr();
  const auto wanted = [&](Input::Name name) { return grads[name].numel() > 0; };
  const bool through = wanted(Input::kX) && tensors[Input::kDown],
             through_gate = wanted(Input::kGateInput) && a.Rg;
  a.need_dz =
      through || wanted(Input::kDown) || wanted(Input::kDownBias) || a.dz.p || a.dleft || a.dright;
  a.need_dzg = through_gate || wanted(Input::kGateDown) || wanted(Input::kGateDownBias);
  if (a.need_dz) c.packer.add(&a.up, matrix(*tensors[Input::kUp], "up"));
  if (a.need_dzg) c.packer.add(&a.gate_up, matrix(*tensors[Input::kGateUp], "gate_up"));
  if (through) c.packer.add(&a.down, matrix(*tensors[Input::kDown], "down"));
  if (through_gate) c.packer.add(&a.gate_down, matrix(*tensors[Input::kGateDown], "gate_down"));
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

}  // namespace
}  // namespace petal

STABLE_TORCH_LIBRARY_FRAGMENT(petal_native, m) {
  m.def(
      "gated_bottleneck_fwd(Tensor?[] tensors, Tensor?[] derived, Tensor? rng, int[] codes, "
      "float[] numbers, Tensor(a!)[] results) -> ()");
  m.def(
      "gated_bottleneck_bwd(Tensor?[] tensors, Tensor?[] derived, Tensor? rng, int[] codes, "
      "float[] numbers, Tensor dout, Tensor[] saved, Tensor(a!)[] grads) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(petal_native, CPU, m) {
  m.impl("gated_bottleneck_fwd", TORCH_BOX(&petal::forward));
  m.impl("gated_bottleneck_bwd", TORCH_BOX(&petal::backward));
}
