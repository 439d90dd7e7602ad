// Runs every operator's kernels with vectors of every width on the same numbers and prints the
// largest difference of any result, relative to that result. The AVX2 and AVX-512 sources are
// compiled for whatever CPU runs the tests, so that their tiles, panels and masks are executed where
// no such instructions are.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <deque>
#include <vector>

#include "cpu_widths_experts.h"
#include "cpu_widths_mlp.h"
#include "cpu_widths_modes.h"
#include "cpu_widths_norm.h"
#include "gated_bottleneck/cpu/params.h"
#include "lowrank_linear/cpu/params.h"

namespace {

constexpr int64_t kWidth = 75, kOuts = 2;
constexpr int64_t kWidths[kOuts] = {70, 33};
const CpuDropout kDropout = {123456789012345ull, 7u, 20000u, 65536.0f / (65536 - 20000)};

// Every result of a forward and a backward; `own`: every output has a down-projection of its own.
Results lowrank(const LowrankKernels& kernel, Site site, bool own) {
  const CpuOperands& ops = kernel.operands;
  const int64_t ranks[kOuts] = {kRank, own ? 9 : kRank}, middle = own ? kRank + 9 : kRank;
  const Floats x = numbers(kRows * kWidth, 1), u = numbers(middle * kWidth, 2);
  Floats h(kRows * middle), dx(kRows * kWidth), dh(kRows * middle);
  std::vector<Floats> up, weight, core, y, dy, dup, dcore;
  LowrankOutput outs[kOuts] = {};
  LowrankArgs a = {};
  a.N = kRows, a.D = kWidth, a.K = kOuts, a.middle = middle, a.own = own;
  a.block = 4 * ops.tile_rows;
  a.x = x.data(), a.x_row = kWidth, a.outs = outs, a.site = site;
  a.dropout = kDropout, a.h = h.data();
  a.down = Packed(ops, u, 1, kWidth, kWidth, middle).data;
  for (int64_t k = 0; k < kOuts; ++k) {
    const int64_t o = kWidths[k], rank = ranks[k];
    up.push_back(numbers(o * rank, 10 + k));
    weight.push_back(numbers(o * kWidth, 20 + k));
    core.push_back(numbers(rank * rank, 30 + k));
    dy.push_back(numbers(kRows * o, 40 + k));
    y.emplace_back(kRows * o);
    dup.emplace_back((o + ops.panel) * rank * 2);
    dcore.emplace_back((rank + ops.panel) * rank * 2);
    outs[k].width = o, outs[k].R = rank, outs[k].scale = 0.5f - k;
    if (own && k) outs[k].at = kRank;
    if (site == Site::kInput) {
      const Floats part(u.begin() + outs[k].at * kWidth, u.end());
      outs[k].down = Packed(ops, part, 1, kWidth, kWidth, rank).data;
    }
    outs[k].up = Packed(ops, up[k], 1, rank, rank, o).data;
    outs[k].weight = Packed(ops, weight[k], 1, kWidth, kWidth, o).data;
    outs[k].core = Packed(ops, core[k], rank, 1, rank, rank).data;
    outs[k].y = y[k].data();
  }
  float* scratch = aligned(kernel.forward_scratch(a, DType::kFloat32));
  for (int64_t row = 0; row < kRows; row += a.block) {
    kernel.forward(a, DType::kFloat32, row, std::min(a.block, kRows - row), scratch);
  }
  Floats ddown((kWidth + ops.panel) * middle * 2);
  a.hidden = h.data(), a.hidden_row = middle, a.h = nullptr;
  a.down = Packed(ops, u, kWidth, 1, middle, kWidth).data;
  a.dx = dx.data(), a.dh = dh.data(), a.ddown = ddown.data(), a.need_dh = true;
  for (int64_t k = 0; k < kOuts; ++k) {
    const int64_t rank = ranks[k];
    outs[k].dy = dy[k].data(), outs[k].dy_row = kWidths[k];
    outs[k].up = Packed(ops, up[k], rank, 1, kWidths[k], rank).data;
    outs[k].weight = Packed(ops, weight[k], kWidth, 1, kWidths[k], kWidth).data;
    outs[k].core_t = Packed(ops, core[k], 1, rank, rank, rank).data;
    outs[k].dup = dup[k].data();
    if (site == Site::kMode) outs[k].dcore = dcore[k].data();
  }
  scratch = aligned(kernel.backward_scratch(a, DType::kFloat32));
  kernel.backward(a, DType::kFloat32, 0, 0, kRows, scratch);
  Results all = {h, dx, dh, reduced(ops, ddown, 1, middle, kWidth)};
  for (int64_t k = 0; k < kOuts; ++k) {
    all.push_back(y[k]);
    all.push_back(reduced(ops, dup[k], 1, ranks[k], kWidths[k]));
    if (site == Site::kMode) all.push_back(reduced(ops, dcore[k], 1, ranks[k], ranks[k]));
  }
  return all;
}

// What a call of gated_bottleneck has: H is x or a base, X the gate's input (kXAgain: the
// residual).
enum Has : int {
  kHIsX = 1,
  kBase = 2,
  kXAgain = 4,
  kResidual = 8,
  kNorm = 16,
  kRight = 32,
  kRelu = 64,
  kLogitSeesY = 128
};

// One call: three samples of 37 rows, rank 21, gate's rank 13.
struct Example {
  Gate gate;
  Route route;
  Activation activation;
  int64_t D, O, Dg, V;
  int has;
};
constexpr Example kExamples[] = {
    {Gate::kLarge, Route::kNone, Activation::kGeluTanh, 75, 75, 75, 0, kHIsX | kXAgain | kNorm},
    {Gate::kLarge, Route::kProduct, Activation::kIdentity, 40, 83, 52, 1, kRight | kNorm},
    {Gate::kSmall, Route::kMul, Activation::kSilu, 75, 75, 75, 1,
     kHIsX | kLogitSeesY | kResidual | kNorm},
    {Gate::kMiddleX, Route::kProduct, Activation::kGelu, 75, 70, 70, 9,
     kBase | kRight | kRelu | kResidual},
    {Gate::kMiddleY, Route::kProduct, Activation::kRelu, 33, 70, 0, 21, kBase | kNorm},
    {Gate::kNone, Route::kAdd, Activation::kGeluTanh, 75, 75, 0, 1, kHIsX},
};

// Inputs, packed operands and results of one example on one table of kernels. Results are NaN until
// they are written.
class Gated {
 public:
  Gated(const GatedKernels& kernel, const Example& e)
      : kernel_(kernel), ops_(kernel.operands), e_(e) {
    a_.type = DType::kFloat32;
    a_.N = kN, a_.D = e.D, a_.O = e.O, a_.Dg = e.Dg, a_.V = e.V, a_.R = kRank;
    a_.Rg = e.gate == Gate::kLarge ? 13 : 0;
    a_.L = e.route != Route::kNone || e.gate == Gate::kSmall ? kL : kN;
    a_.block = 4 * ops_.tile_rows;
    a_.activation = e.activation, a_.route = e.route, a_.gate = e.gate, a_.route_relu = has(kRelu);
    a_.sees_output = has(kLogitSeesY), a_.add_input = has(kHIsX), a_.add_gate_input = has(kXAgain);
    a_.scale = 0.5f, a_.eps = 1e-5f, a_.dropout = kDropout;
  }

  Results run() {
    inputs();
    a_.out = result(e_.O), a_.z = result(kRank);
    if (a_.Rg) a_.zg = result(a_.Rg);
    if (has_logits()) a_.logits = static_cast<float*>(result(1).p);
    if (has(kNorm)) a_.moments = static_cast<float*>(result(2).p);
    int64_t step = a_.block;
    if (e_.gate == Gate::kSmall) step = kL > a_.block ? kL : a_.block / kL * kL;
    float* scratch = aligned(kernel_.forward_scratch(a_));
    for (int64_t row = 0; row < kN; row += step) {
      kernel_.forward(a_, row, std::min(kN, row + step), scratch);
    }
    gradients();
    scratch = aligned(kernel_.backward_scratch(a_));
    for (int64_t split = 0; split < kSplits; ++split) {
      kernel_.backward(a_, split, split * kSplitRows, std::min(kN, (split + 1) * kSplitRows),
                       scratch);
    }
    Results all;
    for (const Floats* f : results_) all.push_back(*f);
    for (const Partial& p : partials_)
      all.push_back(reduced(ops_, *p.data, kSplits, p.rows, p.cols));
    return all;
  }

 private:
  static constexpr int64_t kL = 37, kN = 3 * kL, kSplits = 2, kSplitRows = 2 * kL;
  struct Partial {
    const Floats* data;
    int64_t rows, cols;
  };

  bool has(Has what) const { return e_.has & what; }
  bool has_logits() const { return e_.gate == Gate::kMiddleX || e_.gate == Gate::kSmall; }
  Floats& drawn(int64_t n) {
    kept_.push_back(numbers(n, ++seed_));
    return kept_.back();
  }
  CpuRows rows(int64_t width) { return {drawn(kN * width).data(), width}; }
  CpuRows result(int64_t width, int64_t height = kN) {
    kept_.emplace_back(height * width, NAN);
    results_.push_back(&kept_.back());
    return {kept_.back().data(), width};
  }
  // A parameter [rows, cols] as the right operands that forward and backward want.
  void matrix(const float*& transposed, const float*& plain, int64_t rows, int64_t cols) {
    const Floats& m = drawn(rows * cols);
    transposed = Packed(ops_, m, 1, cols, cols, rows).data;
    plain = Packed(ops_, m, cols, 1, rows, cols).data;
  }
  const float* vector(int64_t width) { return Packed(ops_, drawn(width), 0, 1, 1, width).data; }
  float* partial(int64_t rows, int64_t cols) {
    const int64_t panels = (cols + ops_.panel - 1) / ops_.panel;
    kept_.emplace_back(kSplits * panels * ops_.panel * rows, NAN);
    partials_.push_back({&kept_.back(), rows, cols});
    return kept_.back().data();
  }

  void inputs() {
    a_.x = rows(e_.D);
    if (has(kBase)) a_.base = rows(e_.O);
    if (e_.Dg) a_.gate_input = rows(e_.Dg);
    if (has(kResidual)) a_.residual = rows(e_.O);
    if (e_.V) a_.left = drawn(3 * e_.V * kRank).data();
    if (has(kRight)) a_.right = drawn(3 * e_.V * kRank).data();
    matrix(a_.down_t, a_.down, kRank, e_.D);
    matrix(a_.up_t, a_.up, e_.O, kRank);
    a_.down_bias = vector(kRank), a_.up_bias = vector(e_.O);
    if (a_.Rg) {
      matrix(a_.gate_down_t, a_.gate_down, a_.Rg, e_.Dg);
      matrix(a_.gate_up_t, a_.gate_up, e_.O, a_.Rg);
      a_.gate_down_bias = vector(a_.Rg), a_.gate_up_bias = vector(e_.O);
    }
    if (e_.gate == Gate::kMiddleY) a_.channel = vector(e_.O);
    if (has_logits()) {
      a_.weight_x = vector(e_.O), a_.weight_h = vector(e_.O), a_.logit_bias = vector(1);
      if (has(kLogitSeesY)) a_.weight_a = vector(kRank);
    }
    if (e_.gate == Gate::kSmall) {
      Floats& shares = drawn(kN);
      for (float& share : shares) share = (1.0f + share) / kL;
      a_.token_weights = shares.data();
    }
    if (has(kNorm)) a_.norm_weight = vector(e_.O), a_.norm_bias = vector(e_.O);
    a_.dout = rows(e_.O);
  }

  void gradients() {
    a_.need_dz = true, a_.need_dzg = a_.Rg > 0;
    a_.dx = result(e_.D);
    if (a_.base.p) a_.dbase = result(e_.O);
    if (a_.gate_input.p) a_.dgate_input = result(e_.Dg);
    if (a_.residual.p) a_.dresidual = result(e_.O);
    if (a_.left) a_.dleft = result(kRank, 3 * e_.V).p;
    if (a_.right) a_.dright = result(kRank, 3 * e_.V).p;
    a_.ddown = partial(kRank, e_.D), a_.dup_t = partial(kRank, e_.O);
    a_.ddown_bias = partial(1, kRank), a_.dup_bias = partial(1, e_.O);
    if (a_.Rg) {
      a_.dgate_down = partial(a_.Rg, e_.Dg), a_.dgate_up_t = partial(a_.Rg, e_.O);
      a_.dgate_down_bias = partial(1, a_.Rg), a_.dgate_up_bias = partial(1, e_.O);
    }
    if (a_.channel) a_.dchannel = partial(1, e_.O);
    if (has_logits()) {
      a_.dweight_x = partial(1, e_.O), a_.dweight_h = partial(1, e_.O),
      a_.dlogit_bias = partial(1, 1);
    }
    if (has(kNorm)) a_.dnorm_weight = partial(1, e_.O), a_.dnorm_bias = partial(1, e_.O);
  }

  const GatedKernels& kernel_;
  const CpuOperands& ops_;
  const Example& e_;
  GatedArgs a_ = {};
  unsigned seed_ = 0;
  std::deque<Floats> kept_;
  std::vector<const Floats*> results_;
  std::vector<Partial> partials_;
};

// The largest difference between two runs, each result's relative to its largest value.
double apart(const Results& one, const Results& other) {
  double worst = one.size() == other.size() ? 0.0 : INFINITY;
  for (size_t k = 0; k < std::min(one.size(), other.size()); ++k) {
    double scale = 0.0, most = one[k].size() == other[k].size() ? 0.0 : INFINITY;
    for (size_t i = 0; i < std::min(one[k].size(), other[k].size()); ++i) {
      const double d = std::fabs(one[k][i] - other[k][i]);
      scale = std::fmax(scale, std::fabs(one[k][i]));
      most = std::isfinite(d) ? std::fmax(most, d) : INFINITY;
    }
    worst = std::fmax(worst, most / scale);
  }
  return worst;
}

}  // namespace

int main() {
  double worst = 0.0;
  for (bool own : {false, true}) {
    for (Site site : {Site::kBottleneck, Site::kInput, Site::kMode}) {
      if (own && site == Site::kMode) continue;
      const Results one = lowrank(generic::lowrank_kernels(), site, own);
      for (const LowrankKernels* other : {&avx2::lowrank_kernels(), &avx512::lowrank_kernels()}) {
        worst = std::fmax(worst, apart(one, lowrank(*other, site, own)));
      }
    }
  }
  for (const Example& e : kExamples) {
    const Results one = Gated(generic::gated_kernels(), e).run();
    for (const GatedKernels* other : {&avx2::gated_kernels(), &avx512::gated_kernels()}) {
      worst = std::fmax(worst, apart(one, Gated(*other, e).run()));
    }
  }
  for (const Mixture& m : kMixtures) {
    const Results one = Experts(generic::expert_kernels(), m).run();
    for (const ExpertKernels* other : {&avx2::expert_kernels(), &avx512::expert_kernels()}) {
      worst = std::fmax(worst, apart(one, Experts(*other, m).run()));
    }
  }
  for (int form = 0; form < 4; ++form) {
    const Results one = modes(generic::mode_kernels(), form & 1, form & 2);
    for (const ModeKernels* other : {&avx2::mode_kernels(), &avx512::mode_kernels()}) {
      worst = std::fmax(worst, apart(one, modes(*other, form & 1, form & 2)));
    }
  }
  for (int form = 0; form < 10; ++form) {
    const Activation activation = static_cast<Activation>(form / 2);
    const Results one = mlp(generic::mlp_kernels(), activation, form & 1);
    for (const MlpKernels* other : {&avx2::mlp_kernels(), &avx512::mlp_kernels()}) {
      worst = std::fmax(worst, apart(one, mlp(*other, activation, form & 1)));
    }
  }
  for (int form = 0; form < 3; ++form) {
    const Results one = norm(generic::norm_kernels(), form == 0, form == 1);
    for (const NormKernels* other : {&avx2::norm_kernels(), &avx512::norm_kernels()}) {
      worst = std::fmax(worst, apart(one, norm(*other, form == 0, form == 1)));
    }
  }
  std::printf("%g\n", worst);
  return 0;
}
