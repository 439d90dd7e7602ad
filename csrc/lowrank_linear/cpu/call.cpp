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
int64_t block_rows(const LowrankArgs& a, const CpuOperands& operands, bool rereads_x) {
  int64_t rows = kBlockRows;
  if (rereads_x) rows = std::clamp<int64_t>(kBlockBytes / 4 / std::max<int64_t>(a.D, 1), 48, rows);
  return std::max<int64_t>(1, rows / operands.tile_rows) * operands.tile_rows;
}

bool worth_threads(const LowrankArgs& a) {
  int64_t work = a.middle * a.D;
  for (int64_t k = 0; k < a.K; ++k) work += a.outs[k].R * a.outs[k].width;
  return a.N * work > kSerialWork;
}

void check_rows(const Tensor& t, const char* name, int64_t rows, int64_t cols, DType type) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, ": want [", rows,
                  ", ", cols, "]");
  STD_TORCH_CHECK(dtype_of(t, name) == type, name, ": its dtype differs from the activations'");
}

struct Numbers {
  std::vector<double> scales;
  double dropout;
  int64_t site;
};

// What forward and backward have in common. h is [N, middle]; where that is not what every output
// reads, each has its own part of it.
LowrankArgs arguments(int64_t rows, int64_t middle, const Tensors& ups,
                      std::vector<LowrankOutput>& outs, const Numbers& numbers,
                      const Optional& rng) {
  STD_TORCH_CHECK(!ups.empty(), "ups: want at least one matrix");
  STD_TORCH_CHECK(numbers.scales.size() == ups.size(), "scales: want ", ups.size(), ", got ",
                  numbers.scales.size());
  STD_TORCH_CHECK(numbers.site >= 0 && numbers.site <= 2, "site: want 0, 1 or 2, got ",
                  numbers.site);
  LowrankArgs a = {};
  a.N = rows, a.middle = middle, a.K = static_cast<int64_t>(ups.size());
  a.site = static_cast<Site>(numbers.site), a.dropout = cpu_dropout(rng, numbers.dropout);
  a.own = a.K > 1 && ups[0].size(1) != middle;
  outs.assign(ups.size(), LowrankOutput{});
  int64_t at = 0;
  for (size_t k = 0; k < ups.size(); ++k) {
    STD_TORCH_CHECK(ups[k].dim() == 2 && (a.own || ups[k].size(1) == middle), "ups: want [O, ",
                    middle, "]");
    outs[k].width = ups[k].size(0), outs[k].R = ups[k].size(1);
    outs[k].scale = static_cast<float>(numbers.scales[k]), outs[k].at = at;
    if (a.own) at += outs[k].R;
  }
  STD_TORCH_CHECK(!a.own || (at == middle && a.site != Site::kMode), "ups: want ", middle,
                  " columns together, got ", at);
  a.outs = outs.data();
  return a;
}

int64_t rows_of(const Tensors& matrices) {
  int64_t rows = 0;
  for (const Tensor& m : matrices) rows += m.size(0);
  return rows;
}

// The down-projections of forward: one operand [D, R_k] for each mask of x, or one of all.
void pack_downs(Packer& packer, LowrankArgs& a, const Tensors& downs) {
  const bool masked = a.site == Site::kInput && a.dropout.threshold != 0;
  const size_t wanted = masked && a.own ? a.K : 1;
  STD_TORCH_CHECK(downs.size() == wanted, "downs: want ", wanted, ", got ", downs.size());
  for (size_t k = 0; k < downs.size(); ++k) {
    STD_TORCH_CHECK(wanted == 1 || downs[k].size(0) == a.outs[k].R, "downs: want [", a.outs[k].R,
                    ", D]");
    packer.add(masked ? &a.outs[k].down : &a.down, matrix(downs[k], "downs").transposed());
  }
}

void forward(Optional x, Tensors downs, Optional hidden, Tensors ups, Tensors weights,
             std::vector<Optional> biases, Tensors base, Optional core, Optional rng,
             std::vector<double> scales, double dropout, int64_t site, Tensors ys, Optional h) {
  const LowrankKernels& kernel = kernels();
  STD_TORCH_CHECK(hidden || (x && !downs.empty()), "x: want x and downs, or hidden");
  const Tensor& first = hidden ? *hidden : *x;
  const DType type = dtype_of(first, "x");
  std::vector<LowrankOutput> outs;
  LowrankArgs a = arguments(first.size(0), hidden ? hidden->size(1) : rows_of(downs), ups, outs,
                            {std::move(scales), dropout, site}, rng);
  Packer packer;
  if (x) {
    a.D = x->size(1), a.x = x->const_data_ptr(), a.x_row = row_stride(*x, "x");
    check_rows(*x, "x", a.N, a.D, type);
  }
  if (hidden) {
    a.hidden = hidden->const_data_ptr(), a.hidden_row = row_stride(*hidden, "hidden");
  } else {
    pack_downs(packer, a, downs);
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
  if (h) check_rows(*h, "h", a.N, a.middle, type), a.h = h->mutable_data_ptr();
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

std::vector<Matrix> matrices(const Tensors& tensors, const char* name) {
  std::vector<Matrix> out;
  for (const Tensor& t : tensors) out.push_back(matrix(t, name));
  return out;
}

// Absent results are nullopt or an empty list. dx_has_base: dx holds sum_k dy_k W_k already.
void backward(Tensors dys, Optional x, Tensor h, Tensors downs, Tensors ups, Tensors weights,
              Optional core, Optional rng, std::vector<double> scales, double dropout, int64_t site,
              bool dx_has_base, Optional dx, Optional dh, Tensors ddowns, Tensors dups,
              Optional dcore) {
  const LowrankKernels& kernel = kernels();
  const DType type = dtype_of(h, "h");
  std::vector<LowrankOutput> outs;
  LowrankArgs a =
      arguments(h.size(0), h.size(1), ups, outs, {std::move(scales), dropout, site}, rng);
  STD_TORCH_CHECK(downs.empty() || rows_of(downs) == a.middle, "downs: want ", a.middle,
                  " rows together, got ", rows_of(downs));
  const int64_t least = std::clamp<int64_t>(a.N / kBlockRows * 2, 1, kLeastSplits);
  const int64_t splits = std::clamp<int64_t>(ceil_div(a.N, kSplitRows), least, kMaxSplits);
  const int64_t split_rows = std::max<int64_t>(ceil_div(a.N, splits), 1);
  Packer packer;
  Gradients gradients(splits, kernel.operands.panel);
  a.hidden = h.const_data_ptr(), a.hidden_row = row_stride(h, "h");
  a.need_dh = !ddowns.empty() || dh || dcore || (dx && !downs.empty());
  a.dx_has_base = dx_has_base;
  if (x) a.x = x->const_data_ptr(), a.x_row = row_stride(*x, "x"), a.D = x->size(1);
  if (dx) {
    a.dx = dx->mutable_data_ptr(), a.D = dx->size(1);
    if (!downs.empty()) packer.add(&a.down, matrices(downs, "downs"));
  }
  if (dh) check_rows(*dh, "dh", a.N, a.middle, type), a.dh = dh->mutable_data_ptr();
  if (!ddowns.empty()) gradients.add(&a.ddown, matrices(ddowns, "ddowns"));
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
      "lowrank_linear_fwd(Tensor? x, Tensor[] downs, Tensor? hidden, Tensor[] ups, "
      "Tensor[] weights, Tensor?[] biases, Tensor[] base, Tensor? core, Tensor? rng, "
      "float[] scales, float dropout, int site, Tensor(a!)[] ys, Tensor(b!)? h) -> ()");
  m.def(
      "lowrank_linear_bwd(Tensor[] dys, Tensor? x, Tensor h, Tensor[] downs, Tensor[] ups, "
      "Tensor[] weights, Tensor? core, Tensor? rng, float[] scales, "
      "float dropout, int site, bool dx_has_base, Tensor(a!)? dx, Tensor(b!)? dh, "
      "Tensor(c!)[] ddowns, Tensor(d!)[] dups, Tensor(e!)? dcore) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(petal_native, CPU, m) {
  m.impl("lowrank_linear_fwd", TORCH_BOX(&petal::forward));
  m.impl("lowrank_linear_bwd", TORCH_BOX(&petal::backward));
}
