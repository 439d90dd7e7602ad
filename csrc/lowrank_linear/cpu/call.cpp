// lowrank_linear on the CPU: checks, packing of the weights, row blocks to threads, registration.
#include "common/cpu/pack.h"
#include "params.h"

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

constexpr int64_t kBlockBytes = 384 << 10;  // of x per block: with a panel of W_k it fits L2
constexpr int64_t kBlockRows = 192;
constexpr int64_t kSplitRows = 512;  // rows that share one partial of each weight gradient
constexpr int64_t kLeastSplits =
    4;  // where there are rows enough for as many blocks: a few threads
constexpr int64_t kMaxSplits = 64;
constexpr int64_t kSerialWork = 1 << 20;  // multiply-adds below which threads do not pay

// The block of x stays in L2 where it is read once per output, else it only passes through.
int64_t block_rows(const LowrankArgs& a, const CpuOperands& operands, bool keeps_x) {
  int64_t rows = kBlockRows;
  if (keeps_x) rows = std::clamp<int64_t>(kBlockBytes / 4 / std::max<int64_t>(a.D, 1), 48, rows);
  return std::max<int64_t>(1, rows / operands.tile_rows) * operands.tile_rows;
}

bool worth_threads(const LowrankArgs& a) {
  int64_t wide = a.D;
  for (int64_t k = 0; k < a.K; ++k) wide += a.outs[k].width;
  return a.N * a.R * wide > kSerialWork;
}

void check_rows(const Tensor& t, const char* name, int64_t rows, int64_t cols, DType type) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, ": want [", rows,
                  ", ", cols, "]");
  STD_TORCH_CHECK(dtype_of(t, name) == type, name, ": its dtype differs from the activations'");
}

// What forward and backward have in common; `bottleneck` is [N, R], or x where there is none yet.
LowrankArgs arguments(const Tensor& bottleneck, const Tensors& ups,
                      std::vector<LowrankOutput>& outs, double scale, int64_t site,
                      const CpuDropout& dropout) {
  STD_TORCH_CHECK(!ups.empty(), "ups: want at least one matrix");
  STD_TORCH_CHECK(site >= 0 && site <= 2, "site: want 0, 1 or 2, got ", site);
  LowrankArgs a = {};
  a.N = bottleneck.size(0), a.R = ups[0].size(1), a.K = static_cast<int64_t>(ups.size());
  a.scale = static_cast<float>(scale), a.site = static_cast<Site>(site), a.dropout = dropout;
  outs.assign(ups.size(), LowrankOutput{});
  for (size_t k = 0; k < ups.size(); ++k) {
    STD_TORCH_CHECK(ups[k].dim() == 2 && ups[k].size(1) == a.R, "ups: want [O, ", a.R, "]");
    outs[k].width = ups[k].size(0);
  }
  a.outs = outs.data();
  return a;
}

void forward(Optional x, Optional down, Optional hidden, Tensors ups, Tensors weights,
             std::vector<Optional> biases, Tensors base, Optional core, Optional rng, double scale,
             double dropout, int64_t site, Tensors ys, Optional h) {
  const LowrankKernels& kernel = kernels();
  STD_TORCH_CHECK(hidden || (x && down), "x: want x and down, or hidden");
  const DType type = dtype_of(hidden ? *hidden : *x, "x");
  std::vector<LowrankOutput> outs;
  LowrankArgs a =
      arguments(hidden ? *hidden : *x, ups, outs, scale, site, cpu_dropout(rng, dropout));
  Packer packer;
  if (x) {
    a.D = x->size(1), a.x = x->const_data_ptr(), a.x_row = row_stride(*x, "x");
    check_rows(*x, "x", a.N, a.D, type);
  }
  if (hidden) {
    a.hidden = hidden->const_data_ptr(), a.hidden_row = row_stride(*hidden, "hidden");
  } else {
    packer.add(&a.down, matrix(*down, "down").transposed());
  }
  for (int64_t k = 0; k < a.K; ++k) {
    LowrankOutput& o = outs[k];
    packer.add(&o.up, matrix(ups[k], "ups").transposed());
    if (!weights.empty()) packer.add(&o.weight, matrix(weights[k], "weights").transposed());
    if (!biases.empty() && biases[k]) {
      const Tensor& b = *biases[k];
      void* data = const_cast<void*>(b.const_data_ptr());
      packer.add(&o.bias, {data, dtype_of(b, "biases"), 1, o.width, 0, b.stride(0)});
    }
    if (!base.empty()) {
      check_rows(base[k], "base", a.N, o.width, type);
      o.base = base[k].const_data_ptr(), o.base_row = row_stride(base[k], "base");
    }
    if (core) packer.add(&o.core, slice(*core, k, "core"));
    check_rows(ys[k], "ys", a.N, o.width, type);
    o.y = ys[k].mutable_data_ptr();
  }
  if (h) a.h = h->mutable_data_ptr();
  const bool parallel = worth_threads(a);
  a.block = block_rows(a, kernel.operands, !weights.empty() || type != DType::kFloat32);
  Scratch packed(packer.floats(kernel.operands.panel));
  packer.run(packed.data(), kernel.operands, parallel);
  run_tasks(ceil_div(a.N, a.block), parallel, [&](const auto& next) {
    int64_t i = next();
    if (i < 0) return;
    Scratch scratch(kernel.forward_scratch(a, type));
    for (; i >= 0; i = next()) {
      const int64_t row = i * a.block;
      kernel.forward(a, type, row, std::min(a.block, a.N - row), scratch.data());
    }
  });
}

// Absent results are nullopt or an empty list. dx_has_base: dx holds sum_k dy_k W_k already.
void backward(Tensors dys, Optional x, Tensor h, Optional down, Tensors ups, Tensors weights,
              Optional core, Optional rng, double scale, double dropout, int64_t site,
              bool dx_has_base, Optional dx, Optional dh, Optional ddown, Tensors dups,
              Optional dcore) {
  const LowrankKernels& kernel = kernels();
  const DType type = dtype_of(h, "h");
  std::vector<LowrankOutput> outs;
  LowrankArgs a = arguments(h, ups, outs, scale, site, cpu_dropout(rng, dropout));
  const int64_t least = std::clamp<int64_t>(a.N / kBlockRows * 2, 1, kLeastSplits);
  const int64_t splits = std::clamp<int64_t>(ceil_div(a.N, kSplitRows), least, kMaxSplits);
  const int64_t split_rows = std::max<int64_t>(ceil_div(a.N, splits), 1);
  Packer packer;
  Gradients gradients(splits, kernel.operands.panel);
  a.hidden = h.const_data_ptr(), a.hidden_row = row_stride(h, "h");
  a.need_dh = ddown || dh || dcore || (dx && down);
  a.dx_has_base = dx_has_base;
  if (x) a.x = x->const_data_ptr(), a.x_row = row_stride(*x, "x"), a.D = x->size(1);
  if (dx) {
    a.dx = dx->mutable_data_ptr(), a.D = dx->size(1);
    if (down) packer.add(&a.down, matrix(*down, "down"));
  }
  if (dh) a.dh = dh->mutable_data_ptr();
  if (ddown) gradients.add(&a.ddown, matrix(*ddown, "ddown"));
  for (int64_t k = 0; k < a.K; ++k) {
    LowrankOutput& o = outs[k];
    check_rows(dys[k], "dys", a.N, o.width, type);
    o.dy = dys[k].const_data_ptr(), o.dy_row = row_stride(dys[k], "dys");
    packer.add(&o.up, matrix(ups[k], "ups"));
    if (dx && !weights.empty()) packer.add(&o.weight, matrix(weights[k], "weights"));
    if (core) {
      packer.add(&o.core, slice(*core, k, "core"));
      packer.add(&o.core_t, slice(*core, k, "core").transposed());
    }
    if (!dups.empty()) gradients.add(&o.dup, matrix(dups[k], "dups").transposed());
    if (dcore) gradients.add(&o.dcore, slice(*dcore, k, "dcore"));
  }
  const int64_t packed = packer.floats(kernel.operands.panel);
  Scratch work(packed + gradients.floats());
  gradients.place(work.data() + packed);
  if (a.N == 0) std::fill_n(work.data() + packed, gradients.floats(), 0.0f);
  const bool parallel = worth_threads(a);
  a.block = std::min(block_rows(a, kernel.operands, dx && !weights.empty()), split_rows);
  packer.run(work.data(), kernel.operands, parallel);
  run_tasks(splits, parallel, [&](const auto& next) {
    int64_t s = next();
    if (s < 0) return;
    Scratch scratch(kernel.backward_scratch(a, type));
    for (; s >= 0; s = next()) {
      const int64_t row = s * split_rows;
      kernel.backward(a, type, s, row, std::min(a.N, row + split_rows), scratch.data());
    }
  });
  gradients.reduce(kernel.operands, parallel);
}

}  // namespace
}  // namespace petal

STABLE_TORCH_LIBRARY_FRAGMENT(petal_native, m) {
  m.def(
      "lowrank_linear_fwd(Tensor? x, Tensor? down, Tensor? hidden, Tensor[] ups, "
      "Tensor[] weights, Tensor?[] biases, Tensor[] base, Tensor? core, Tensor? rng, float scale, "
      "float dropout, int site, Tensor(a!)[] ys, Tensor(b!)? h) -> ()");
  m.def(
      "lowrank_linear_bwd(Tensor[] dys, Tensor? x, Tensor h, Tensor? down, Tensor[] ups, "
      "Tensor[] weights, Tensor? core, Tensor? rng, float scale, "
      "float dropout, int site, bool dx_has_base, Tensor(a!)? dx, Tensor(b!)? dh, "
      "Tensor(c!)? ddown, Tensor(d!)[] dups, Tensor(e!)? dcore) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(petal_native, CPU, m) {
  m.impl("lowrank_linear_fwd", TORCH_BOX(&petal::forward));
  m.impl("lowrank_linear_bwd", TORCH_BOX(&petal::backward));
}
