// lowrank_linear on the CPU: checks, packing of the weights, blocks of rows to threads, registration.
#include "lowrank_linear_cpu.h"

#include <algorithm>

#include "common/cpu_pack.h"

namespace petal {
namespace {

using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;

const LowrankKernels& kernels() {
  switch (current_isa()) {
#if defined(PETAL_BUILT_AVX512)
    case Isa::kAvx512: return avx512::lowrank_kernels();
#endif
#if defined(PETAL_BUILT_AVX2)
    case Isa::kAvx2: return avx2::lowrank_kernels();
#endif
    default: return generic::lowrank_kernels();
  }
}

constexpr int64_t kBlockBytes = 384 << 10;  // of x per block: with the panels of W_k it fits L2
constexpr int64_t kBlockRows = 192;
constexpr int64_t kSplitRows = 512;         // rows that share one partial of each weight gradient
constexpr int64_t kMaxSplits = 64;
constexpr int64_t kSerialWork = 1 << 20;    // multiply-adds below which threads cost more than they do

Site site_of(int64_t site) {
  STD_TORCH_CHECK(site >= 0 && site <= 2, "site: want 0, 1 or 2, got ", site);
  return static_cast<Site>(site);
}

int64_t block_rows(const LowrankArgs& a, const LowrankKernels& kernel, bool whole_rows) {
  int64_t rows = kBlockRows;
  if (whole_rows) rows = std::max<int64_t>(48, std::min(rows, kBlockBytes / 4 / std::max<int64_t>(a.D, 1)));
  return std::max<int64_t>(1, rows / kernel.operands.tile_rows) * kernel.operands.tile_rows;
}

// Multiply-adds of a call, to decide whether threads are worth waking.
bool worth_threads(const LowrankArgs& a) {
  int64_t wide = a.D;
  for (int64_t k = 0; k < a.K; ++k) wide += a.outs[k].width;
  return a.N * a.R * wide > kSerialWork;
}

void check_rows(const Tensor& t, const char* name, int64_t rows, int64_t cols, CpuType type) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, ": want [", rows, ", ", cols, "]");
  STD_TORCH_CHECK(cpu_type(t, name) == type, name, ": its dtype differs from the activations'");
}

void forward(Optional x, Optional down, Optional hidden, Tensors ups, Tensors weights,
             std::vector<Optional> biases, Tensors base, Optional core, Optional rng, double scale,
             int64_t threshold, double keep_scale, int64_t site, Tensors ys, Optional h) {
  const Tensor& like = hidden ? *hidden : *x;
  const CpuType type = cpu_type(like, "x");
  const LowrankKernels& kernel = kernels();
  const int64_t count = static_cast<int64_t>(ups.size());
  STD_TORCH_CHECK(count > 0 && ys.size() == ups.size(), "ups: want one matrix per output");
  STD_TORCH_CHECK(biases.empty() || biases.size() == ups.size(), "biases: want one per output");
  LowrankArgs a = {};
  a.N = like.size(0), a.R = ups[0].size(1), a.K = count;
  a.scale = static_cast<float>(scale), a.site = site_of(site);
  a.dropout = cpu_dropout(rng, threshold, keep_scale);
  std::vector<LowrankOutput> outs(count);
  a.outs = outs.data();
  Packer packer;
  if (x) {
    a.D = x->size(1), a.x = x->const_data_ptr(), a.x_row = row_stride(*x, "x");
    check_rows(*x, "x", a.N, a.D, type);
  }
  if (hidden) {
    a.hidden = hidden->const_data_ptr(), a.hidden_row = row_stride(*hidden, "hidden");
  } else {
    STD_TORCH_CHECK(down && x && down->size(0) == a.R && down->size(1) == a.D, "down: want [", a.R, ", ", a.D, "]");
    packer.add(&a.down, *down, "down", false);
  }
  for (int64_t k = 0; k < count; ++k) {
    LowrankOutput& o = outs[k];
    o.width = ups[k].size(0);
    STD_TORCH_CHECK(ups[k].size(1) == a.R, "ups: want one rank");
    packer.add(&o.up, ups[k], "ups", false);
    if (!weights.empty()) {
      packer.add(&o.weight, weights[k], "weights", false);
    }
    if (!biases.empty() && biases[k]) {
      const Tensor& b = *biases[k];
      packer.add(&o.bias, b.const_data_ptr(), cpu_type(b, "biases"), 0, b.stride(0), 1, o.width);
    }
    if (!base.empty()) {
      check_rows(base[k], "base", a.N, o.width, type);
      o.base = base[k].const_data_ptr(), o.base_row = row_stride(base[k], "base");
    }
    if (core) {
      const size_t bytes = type_bytes(cpu_type(*core, "core"));
      packer.add(&o.core, static_cast<const char*>(core->const_data_ptr()) + k * core->stride(0) * bytes,
                 cpu_type(*core, "core"), core->stride(1), core->stride(2), a.R, a.R);
    }
    check_rows(ys[k], "ys", a.N, o.width, type);
    o.y = ys[k].mutable_data_ptr();
  }
  if (h) a.h = h->mutable_data_ptr();
  const bool parallel = worth_threads(a);
  a.block = block_rows(a, kernel, !weights.empty() || type != CpuType::kFloat32);
  Scratch packed(packer.floats(kernel.operands.panel));
  packer.run(packed.data(), kernel.operands, parallel);
  run_tasks(ceil_div(a.N, a.block), parallel, [&](const auto& next) {
    int64_t i = next();
    if (i < 0) return;
    Scratch scratch(kernel.forward_scratch(a, type));
    for (; i >= 0; i = next()) {
      kernel.forward(a, type, i * a.block, std::min(a.block, a.N - i * a.block), scratch.data());
    }
  });
}

// Absent outputs are given as nullopt or an empty list.
void backward(Tensors dys, Optional x, Tensor h, Optional down, Tensors ups, Tensors weights, Optional core,
              Optional rng, double scale, int64_t threshold, double keep_scale, int64_t site,
              bool dx_has_base, Optional dx, Optional dh, Optional ddown, Tensors dups, Optional dcore) {
  const CpuType type = cpu_type(h, "h");
  const LowrankKernels& kernel = kernels();
  const int64_t count = static_cast<int64_t>(ups.size());
  STD_TORCH_CHECK(count > 0 && dys.size() == ups.size(), "dys: want one matrix per output");
  LowrankArgs a = {};
  a.N = h.size(0), a.R = h.size(1), a.K = count;
  a.hidden = h.const_data_ptr(), a.hidden_row = row_stride(h, "h");
  a.scale = static_cast<float>(scale), a.site = site_of(site);
  a.dropout = cpu_dropout(rng, threshold, keep_scale);
  a.need_dh = ddown || dh || dcore || (dx && down);
  a.dx_has_base = dx_has_base;
  std::vector<LowrankOutput> outs(count);
  a.outs = outs.data();
  Packer packer;
  if (x) a.x = x->const_data_ptr(), a.x_row = row_stride(*x, "x"), a.D = x->size(1);
  if (dx) {
    a.dx = dx->mutable_data_ptr(), a.D = dx->size(1);
    if (down) packer.add(&a.down, *down, "down", true);
  }
  if (dh) a.dh = dh->mutable_data_ptr();
  for (int64_t k = 0; k < count; ++k) {
    LowrankOutput& o = outs[k];
    o.width = ups[k].size(0);
    check_rows(dys[k], "dys", a.N, o.width, type);
    o.dy = dys[k].const_data_ptr(), o.dy_row = row_stride(dys[k], "dys");
    packer.add(&o.up, ups[k], "ups", true);
    if (dx && !weights.empty()) packer.add(&o.weight, weights[k], "weights", true);
    if (core) {
      const CpuType core_type = cpu_type(*core, "core");
      const char* from = static_cast<const char*>(core->const_data_ptr()) + k * core->stride(0) * type_bytes(core_type);
      packer.add(&o.core, from, core_type, core->stride(1), core->stride(2), a.R, a.R);
      packer.add(&o.core_t, from, core_type, core->stride(2), core->stride(1), a.R, a.R);
    }
  }
  const int64_t splits = std::clamp<int64_t>(ceil_div(a.N, kSplitRows), 1, kMaxSplits);
  const int64_t split_rows = ceil_div(a.N, splits);
  const int64_t packed_floats = packer.floats(kernel.operands.panel);
  const int64_t panel = kernel.operands.panel;
  int64_t partial_floats = 0;
  const auto partial = [&](int64_t cols) {
    const int64_t at = partial_floats;
    partial_floats += splits * ceil_div(cols, panel) * panel * a.R;
    return at;
  };
  const int64_t ddown_at = ddown ? partial(a.D) : 0;
  std::vector<int64_t> dup_at(count), dcore_at(count);
  for (int64_t k = 0; k < count; ++k) {
    if (!dups.empty()) dup_at[k] = partial(outs[k].width);
    if (dcore) dcore_at[k] = partial(a.R);
  }
  Scratch work(packed_floats + partial_floats);
  float* partials = work.data() + packed_floats;
  if (a.N == 0) std::fill_n(partials, partial_floats, 0.0f);
  std::vector<Gradient> gradients;
  if (ddown) {
    a.ddown = partials + ddown_at;
    gradients.push_back({ddown->mutable_data_ptr(), cpu_type(*ddown, "ddown"), ddown->stride(0), ddown->stride(1), a.D, a.ddown});
  }
  for (int64_t k = 0; k < count; ++k) {
    if (!dups.empty()) {
      outs[k].dup = partials + dup_at[k];
      gradients.push_back({dups[k].mutable_data_ptr(), cpu_type(dups[k], "dups"), dups[k].stride(1), dups[k].stride(0), outs[k].width, outs[k].dup});
    }
    if (dcore) {
      const CpuType core_type = cpu_type(*dcore, "dcore");
      outs[k].dcore = partials + dcore_at[k];
      gradients.push_back({static_cast<char*>(dcore->mutable_data_ptr()) + k * dcore->stride(0) * type_bytes(core_type), core_type, dcore->stride(1), dcore->stride(2), a.R, outs[k].dcore});
    }
  }
  const bool parallel = worth_threads(a);
  a.block = std::min(block_rows(a, kernel, dx && !weights.empty()), std::max<int64_t>(split_rows, 1));
  packer.run(work.data(), kernel.operands, parallel);
  run_tasks(splits, parallel, [&](const auto& next) {
    int64_t s = next();
    if (s < 0) return;
    Scratch scratch(kernel.backward_scratch(a, type));
    for (; s >= 0; s = next()) {
      kernel.backward(a, type, s, s * split_rows, std::min(a.N, (s + 1) * split_rows), scratch.data());
    }
  });
  reduce_all(gradients, splits, a.R, kernel.operands, parallel);
}

}  // namespace
}  // namespace petal

STABLE_TORCH_LIBRARY_FRAGMENT(petal_native, m) {
  m.def(
      "lowrank_linear_forward(Tensor? x, Tensor? down, Tensor? hidden, Tensor[] ups, Tensor[] weights, "
      "Tensor?[] biases, Tensor[] base, Tensor? core, Tensor? rng, float scale, int threshold, "
      "float keep_scale, int site, Tensor(a!)[] ys, Tensor(b!)? h) -> ()");
  m.def(
      "lowrank_linear_backward(Tensor[] dys, Tensor? x, Tensor h, Tensor? down, Tensor[] ups, "
      "Tensor[] weights, Tensor? core, Tensor? rng, float scale, int threshold, float keep_scale, int site, "
      "bool dx_has_base, Tensor(a!)? dx, Tensor(b!)? dh, Tensor(c!)? ddown, Tensor(d!)[] dups, "
      "Tensor(e!)? dcore) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(petal_native, CPU, m) {
  m.impl("lowrank_linear_forward", TORCH_BOX(&petal::forward));
  m.impl("lowrank_linear_backward", TORCH_BOX(&petal::backward));
}
