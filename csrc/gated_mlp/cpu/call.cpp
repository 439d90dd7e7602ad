// gated_mlp on the CPU: checks, rows and strips of columns to threads, registration.
#include "common/cpu/pack.h"
#include "params.h"

namespace petal {
namespace {

using Optional = std::optional<Tensor>;

const MlpKernels& kernels() {
  switch (current_isa()) {
#if defined(PETAL_BUILT_AVX512)
    case Isa::kAvx512: return avx512::mlp_kernels();
#endif
#if defined(PETAL_BUILT_AVX2)
    case Isa::kAvx2: return avx2::mlp_kernels();
#endif
    default: return generic::mlp_kernels();
  }
}

constexpr int64_t kSerial = 1 << 14;   // numbers below which threads do not pay
constexpr int64_t kForward = 1 << 15;  // numbers of a forward task, about
constexpr int64_t kSplitRows = 512;    // of a split of the rows, at least
constexpr int64_t kSplits = 8;
constexpr int64_t kWide = 2048;  // columns from which strips alone occupy threads

MlpArgs arguments(const Tensor& g, int64_t activation) {
  MlpArgs a = {};
  STD_TORCH_CHECK(g.dim() == 2, "g: want a matrix, got ", g.dim(), " dimensions");
  STD_TORCH_CHECK(activation >= 0 && activation <= 4, "activation: want 0 .. 4, got ", activation);
  a.N = g.size(0), a.F = g.size(1), a.type = dtype_of(g, "g");
  a.activation = static_cast<Activation>(activation);
  return a;
}

CpuRows rows(const MlpArgs& a, const Optional& t, const char* name, int64_t width) {
  if (!t) return {};
  STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == a.N && t->size(1) == width, name, ": want [", a.N,
                  ", ", width, "]");
  STD_TORCH_CHECK(dtype_of(*t, name) == a.type, name, ": want g's dtype");
  return {const_cast<void*>(t->const_data_ptr()), row_stride(*t, name)};
}

void forward(Tensor g, Optional u, int64_t activation, Tensor p) {
  const MlpKernels& kernel = kernels();
  MlpArgs a = arguments(g, activation);
  a.g = rows(a, g, "g", a.F), a.u = rows(a, u, "u", a.F), a.p = rows(a, p, "p", a.F);
  const int64_t each = std::max<int64_t>(1, kForward / std::max<int64_t>(a.F, 1));
  run_tasks(ceil_div(a.N, each), a.N * a.F > kSerial, [&](const auto& next) {
    for (int64_t i = next(); i >= 0; i = next()) {
      kernel.forward(a, i * each, std::min(a.N, (i + 1) * each));
    }
  });
}

// dp becomes dg.
void backward(Optional dp, Tensor g, Optional u, Optional dh, Optional rng, double dropout,
              int64_t activation, Optional du, Optional ddown) {
  const MlpKernels& kernel = kernels();
  MlpArgs a = arguments(g, activation);
  STD_TORCH_CHECK(dh.has_value() == ddown.has_value(), "ddown: want it where dh is given");
  STD_TORCH_CHECK((dp && u) == du.has_value(), "du: want it where dp and u are given");
  a.R = dh ? dh->size(1) : 0;
  a.g = rows(a, g, "g", a.F), a.u = rows(a, u, "u", a.F), a.dp = rows(a, dp, "dp", a.F);
  a.du = rows(a, du, "du", a.F), a.dh = rows(a, dh, "dh", a.R);
  a.dropout = cpu_dropout(rng, dropout);
  const int64_t strips = ceil_div(a.F, kernel.strip);
  const int64_t most = a.F >= kWide ? 1 : kSplits;
  const int64_t splits = std::clamp<int64_t>(a.N / kSplitRows, 1, most);
  Gradients gradients(splits, kernel.operands.panel);
  if (ddown) {
    const Matrix m = matrix(*ddown, "ddown");
    STD_TORCH_CHECK(m.rows == a.R && m.cols == a.F, "ddown: want [", a.R, ", ", a.F, "]");
    gradients.add(&a.ddown, m);
  }
  Scratch partials(gradients.floats());
  gradients.place(partials.data());
  const bool parallel = a.N * a.F > kSerial;
  run_tasks(splits * strips, parallel, [&](const auto& next) {
    Scratch scratch(kernel.scratch(a));
    for (int64_t i = next(); i >= 0; i = next()) {
      const int64_t s = i / strips;
      kernel.backward(a, s, s * a.N / splits, (s + 1) * a.N / splits, i % strips, scratch.data());
    }
  });
  gradients.reduce(kernel.operands, parallel);
}

}  // namespace
}  // namespace petal

STABLE_TORCH_LIBRARY_FRAGMENT(petal_native, m) {
  m.def("gated_mlp_act_fwd(Tensor g, Tensor? u, int activation, Tensor(a!) p) -> ()");
  m.def(
      "gated_mlp_act_bwd(Tensor(a!)? dp, Tensor g, Tensor? u, Tensor? dh, Tensor? rng, "
      "float dropout, int activation, Tensor(b!)? du, Tensor(c!)? ddown) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(petal_native, CPU, m) {
  m.impl("gated_mlp_act_fwd", TORCH_BOX(&petal::forward));
  m.impl("gated_mlp_act_bwd", TORCH_BOX(&petal::backward));
}
