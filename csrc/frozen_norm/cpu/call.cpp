// frozen_norm on the CPU: checks, rows to threads, registration.
#include "common/cpu/host.h"
#include "params.h"

namespace petal {
namespace {

using Optional = std::optional<Tensor>;

const NormKernels& kernels() {
  switch (current_isa()) {
#if defined(PETAL_BUILT_AVX512)
    case Isa::kAvx512: return avx512::norm_kernels();
#endif
#if defined(PETAL_BUILT_AVX2)
    case Isa::kAvx2: return avx2::norm_kernels();
#endif
    default: return generic::norm_kernels();
  }
}

constexpr int64_t kSerial = 1 << 14;  // numbers below which threads do not pay
constexpr int64_t kTask = 1 << 15;    // numbers of a task, about

// The kinds by their numbers in ops/frozen_norm/arguments.py.
enum Kind : int64_t { kLayer = 0, kRms = 1, kRmsOnce = 2, kRmsPlusOne = 3 };

NormArgs arguments(const Tensor& x, int64_t kind) {
  NormArgs a = {};
  STD_TORCH_CHECK(x.dim() == 2, "x: want a matrix, got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(kind >= kLayer && kind <= kRmsPlusOne, "kind: want 0 .. 3, got ", kind);
  a.N = x.size(0), a.D = x.size(1), a.type = dtype_of(x, "x");
  a.centered = kind == kLayer, a.rounded = kind == kRms, a.offset = kind == kRmsPlusOne;
  return a;
}

CpuRows rows(const NormArgs& a, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == a.N && t.size(1) == a.D, name, ": want [", a.N, ", ",
                  a.D, "]");
  STD_TORCH_CHECK(dtype_of(t, name) == a.type, name, ": want x's dtype");
  return {const_cast<void*>(t.const_data_ptr()), row_stride(t, name)};
}

const void* vector(const NormArgs& a, const Optional& t, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == a.D && t->is_contiguous(), name, ": want [", a.D,
                  "], contiguous");
  STD_TORCH_CHECK(dtype_of(*t, name) == a.type, name, ": want x's dtype");
  return t->const_data_ptr();
}

float* moments_of(const NormArgs& a, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == a.N && t.size(1) == (a.centered ? 2 : 1) &&
                      t.is_contiguous() && dtype_of(t, "moments") == DType::kFloat32,
                  "moments: want [", a.N, ", ", a.centered ? 2 : 1, "] of float32, contiguous");
  return static_cast<float*>(const_cast<void*>(t.const_data_ptr()));
}

void run(const NormArgs& a, void (*kernel)(const NormArgs&, int64_t, int64_t)) {
  const int64_t each = std::max<int64_t>(1, kTask / std::max<int64_t>(a.D, 1));
  run_tasks((a.N + each - 1) / each, a.N * a.D > kSerial, [&](const auto& next) {
    for (int64_t i = next(); i >= 0; i = next()) {
      kernel(a, i * each, std::min(a.N, (i + 1) * each));
    }
  });
}

void forward(Tensor x, Optional weight, Optional bias, int64_t kind, double eps, Tensor y,
             Tensor moments) {
  NormArgs a = arguments(x, kind);
  a.eps = static_cast<float>(eps);
  a.x = rows(a, x, "x"), a.y = rows(a, y, "y"), a.moments = moments_of(a, moments);
  a.weight = vector(a, weight, "weight"), a.bias = vector(a, bias, "bias");
  run(a, kernels().forward);
}

void backward(Tensor dy, Tensor x, Tensor moments, Optional weight, int64_t kind, Tensor dx) {
  NormArgs a = arguments(x, kind);
  a.x = rows(a, x, "x"), a.dy = rows(a, dy, "dy"), a.dx = rows(a, dx, "dx");
  a.moments = moments_of(a, moments), a.weight = vector(a, weight, "weight");
  run(a, kernels().backward);
}

}  // namespace
}  // namespace petal

STABLE_TORCH_LIBRARY_FRAGMENT(petal_native, m) {
  m.def(
      "frozen_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, int kind, float eps, Tensor(a!) y, "
      "Tensor(b!) moments) -> ()");
  m.def(
      "frozen_norm_bwd(Tensor dy, Tensor x, Tensor moments, Tensor? weight, int kind, "
      "Tensor(a!) dx) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(petal_native, CPU, m) {
  m.impl("frozen_norm_fwd", TORCH_BOX(&petal::forward));
  m.impl("frozen_norm_bwd", TORCH_BOX(&petal::backward));
}
