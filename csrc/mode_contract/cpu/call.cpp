// mode_contract on the CPU: checks, packing of the shared factors, slabs to threads, registration.
#include "common/cpu/pack.h"
#include "params.h"

namespace petal {
namespace {

using Optional = std::optional<Tensor>;

const ModeKernels& kernels() {
  switch (current_isa()) {
#if defined(PETAL_BUILT_AVX512)
    case Isa::kAvx512: return avx512::mode_kernels();
#endif
#if defined(PETAL_BUILT_AVX2)
    case Isa::kAvx2: return avx2::mode_kernels();
#endif
    default: return generic::mode_kernels();
  }
}

constexpr int64_t kSplits = 8;            // partials of dp and dV; R alone fixes their slabs
constexpr int64_t kSerialWork = 1 << 20;  // multiply-adds below which threads do not pay

ModeArgs arguments(const Tensor& core, const Tensor& modes, const Optional& up, double scale,
                   const Tensor& out) {
  ModeArgs a = {};
  STD_TORCH_CHECK(modes.dim() == 2, "modes: want a matrix, got ", modes.dim(), " dimensions");
  a.K = modes.size(0), a.R = modes.size(1), a.diagonal = core.dim() == 1;
  a.O = up ? up->size(0) : a.R;
  STD_TORCH_CHECK((a.diagonal || core.dim() == 3) && core.size(0) == a.R, "core: want rank ", a.R);
  STD_TORCH_CHECK(core.is_contiguous(), "core: want a contiguous tensor");
  STD_TORCH_CHECK(!up || (up->dim() == 2 && up->size(1) == a.R), "up: want [O, ", a.R, "]");
  const bool fits =
      out.dim() == 3 && out.size(0) == a.K && out.size(1) == a.R && out.size(2) == a.O;
  STD_TORCH_CHECK(fits && out.is_contiguous(), "out: want contiguous [", a.K, ", ", a.R, ", ", a.O,
                  "]");
  a.in = dtype_of(core, "core"), a.core = core.const_data_ptr();
  a.scale = static_cast<float>(scale), a.out_type = dtype_of(out, "out");
  return a;
}

bool worth_threads(const ModeArgs& a) {
  return a.K * a.R * a.O * (a.diagonal ? 1 : a.R) > kSerialWork;
}

void forward(Tensor core, Tensor modes, Optional up, double scale, Tensor out) {
  const ModeKernels& kernel = kernels();
  ModeArgs a = arguments(core, modes, up, scale, out);
  a.out = out.mutable_data_ptr();
  Packer packer;
  packer.add(&a.modes_t, matrix(modes, "modes").transposed());
  if (up) packer.add(&a.up_t, matrix(*up, "up").transposed());
  const bool parallel = worth_threads(a);
  Scratch packed(packer.floats(kernel.operands.panel));
  packer.run(packed.data(), kernel.operands, parallel);
  run_tasks(a.R, parallel, [&](const auto& next) {
    Scratch scratch(kernel.scratch(a));
    for (int64_t i = next(); i >= 0; i = next()) kernel.forward(a, i, i + 1, scratch.data());
  });
}

void backward(Tensor dout, Tensor core, Tensor modes, Optional up, double scale, Optional dcore,
              Optional dmodes, Optional dup) {
  const ModeKernels& kernel = kernels();
  ModeArgs a = arguments(core, modes, up, scale, dout);
  a.dout = dout.const_data_ptr();
  if (dcore) a.dcore = dcore->mutable_data_ptr();
  STD_TORCH_CHECK(!dcore || dcore->is_contiguous(), "dcore: want a contiguous tensor");
  const int64_t splits = std::min(kSplits, a.R);
  Packer packer;
  Gradients gradients(splits, kernel.operands.panel);
  packer.add(&a.modes_t, matrix(modes, "modes").transposed());
  packer.add(&a.modes, matrix(modes, "modes"));
  if (up) {
    packer.add(&a.up_t, matrix(*up, "up").transposed());
    packer.add(&a.up, matrix(*up, "up"));
  }
  if (dmodes) gradients.add(&a.dmodes, matrix(*dmodes, "dmodes"));
  if (dup) gradients.add(&a.dup, matrix(*dup, "dup").transposed());
  const int64_t packed = packer.floats(kernel.operands.panel);
  Scratch work(packed + gradients.floats());
  gradients.place(work.data() + packed);
  // CP slabs write their own entries only, Tucker slabs all of a partial.
  if (a.diagonal) std::fill_n(work.data() + packed, gradients.floats(), 0.0f);
  const bool parallel = worth_threads(a);
  packer.run(work.data(), kernel.operands, parallel);
  run_tasks(splits, parallel, [&](const auto& next) {
    Scratch scratch(kernel.scratch(a));
    for (int64_t s = next(); s >= 0; s = next()) {
      kernel.backward(a, s, s * a.R / splits, (s + 1) * a.R / splits, scratch.data());
    }
  });
  gradients.reduce(kernel.operands, parallel);
}

}  // namespace
}  // namespace petal

STABLE_TORCH_LIBRARY_FRAGMENT(petal_native, m) {
  m.def(
      "mode_contract_fwd(Tensor core, Tensor modes, Tensor? up, float scale, Tensor(a!) out) "
      "-> ()");
  m.def(
      "mode_contract_bwd(Tensor dout, Tensor core, Tensor modes, Tensor? up, float scale, "
      "Tensor(a!)? dcore, Tensor(b!)? dmodes, Tensor(c!)? dup) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(petal_native, CPU, m) {
  m.impl("mode_contract_fwd", TORCH_BOX(&petal::forward));
  m.impl("mode_contract_bwd", TORCH_BOX(&petal::backward));
}
