// Runs the lowrank_linear kernels of two instruction sets on the same numbers and prints the largest
// difference. The AVX-512 source is compiled with 16-wide vectors for whatever CPU runs the tests,
// so that its tiles, panels and masks are executed where no AVX-512 is.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "lowrank_linear_cpu.h"

using namespace petal;
using Floats = std::vector<float>;

namespace {

constexpr int64_t kRows = 131, kWidth = 75, kRank = 21, kOuts = 2;
constexpr int64_t kWidths[kOuts] = {70, 33};

Floats numbers(int64_t n, unsigned seed) {
  Floats out(n);
  std::srand(seed);
  for (float& v : out) v = static_cast<float>(std::rand() % 2001 - 1000) / 1000.0f;
  return out;
}

struct Packed {
  float* data;
  Packed(const CpuOperands& k, const Floats& src, int64_t sk, int64_t sc, int64_t depth, int64_t cols) {
    const int64_t panels = (cols + k.panel - 1) / k.panel;
    data = static_cast<float*>(std::aligned_alloc(64, (panels * k.panel * depth * 4 + 63) / 64 * 64));
    k.pack(data, src.data(), CpuType::kFloat32, sk, sc, depth, cols, 0, panels);
  }
};

Floats reduced(const CpuOperands& k, const Floats& partials, int64_t cols) {
  Floats out(kRank * cols);
  for (int64_t j = 0; j * k.panel < cols; ++j) {
    k.reduce(out.data(), CpuType::kFloat32, cols, 1, partials.data(), 1, kRank, cols, j);
  }
  return out;
}

// Every result of a forward and a backward, one after the other.
Floats results(const LowrankKernels& kernel, Site site) {
  const CpuOperands& ops = kernel.operands;
  const Floats x = numbers(kRows * kWidth, 1), u = numbers(kRank * kWidth, 2);
  Floats h(kRows * kRank), dx(kRows * kWidth), all;
  std::vector<Floats> up, weight, core, y, dy, dup, dcore;
  LowrankOutput outs[kOuts] = {};
  LowrankArgs a = {};
  a.N = kRows, a.D = kWidth, a.R = kRank, a.K = kOuts, a.block = 4 * ops.tile_rows;
  a.x = x.data(), a.x_row = kWidth, a.outs = outs, a.scale = 0.5f, a.site = site;
  a.dropout = {123456789012345ull, 7u, 20000u, 65536.0f / (65536 - 20000)};
  a.h = h.data();
  a.down = Packed(ops, u, 1, kWidth, kWidth, kRank).data;
  for (int64_t k = 0; k < kOuts; ++k) {
    const int64_t o = kWidths[k];
    up.push_back(numbers(o * kRank, 10 + k));
    weight.push_back(numbers(o * kWidth, 20 + k));
    core.push_back(numbers(kRank * kRank, 30 + k));
    dy.push_back(numbers(kRows * o, 40 + k));
    y.emplace_back(kRows * o);
    dup.emplace_back((o + ops.panel) * kRank * 2);
    dcore.emplace_back((kRank + ops.panel) * kRank * 2);
    outs[k].width = o;
    outs[k].up = Packed(ops, up[k], 1, kRank, kRank, o).data;
    outs[k].weight = Packed(ops, weight[k], 1, kWidth, kWidth, o).data;
    outs[k].core = Packed(ops, core[k], kRank, 1, kRank, kRank).data;
    outs[k].y = y[k].data();
  }
  Floats scratch(1 << 20);
  float* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) / 4;
  for (int64_t row = 0; row < kRows; row += a.block) {
    kernel.forward(a, CpuType::kFloat32, row, std::min(a.block, kRows - row), aligned);
  }
  Floats ddown((kWidth + ops.panel) * kRank * 2);
  a.hidden = h.data(), a.hidden_row = kRank, a.h = nullptr;
  a.down = Packed(ops, u, kWidth, 1, kRank, kWidth).data;
  a.dx = dx.data(), a.ddown = ddown.data(), a.need_dh = true;
  for (int64_t k = 0; k < kOuts; ++k) {
    outs[k].dy = dy[k].data(), outs[k].dy_row = kWidths[k];
    outs[k].up = Packed(ops, up[k], kRank, 1, kWidths[k], kRank).data;
    outs[k].weight = Packed(ops, weight[k], kWidth, 1, kWidths[k], kWidth).data;
    outs[k].core_t = Packed(ops, core[k], 1, kRank, kRank, kRank).data;
    outs[k].dup = dup[k].data();
    if (site == Site::kMode) outs[k].dcore = dcore[k].data();
  }
  kernel.backward(a, CpuType::kFloat32, 0, 0, kRows, aligned);
  const auto append = [&](const Floats& v) { all.insert(all.end(), v.begin(), v.end()); };
  append(h), append(dx), append(reduced(ops, ddown, kWidth));
  for (int64_t k = 0; k < kOuts; ++k) {
    append(y[k]), append(reduced(ops, dup[k], kWidths[k]));
    if (site == Site::kMode) append(reduced(ops, dcore[k], kRank));
  }
  return all;
}

}  // namespace

int main() {
  double worst = 0.0;
  for (Site site : {Site::kBottleneck, Site::kInput, Site::kMode}) {
    const Floats one = results(generic::lowrank_kernels(), site), other = results(avx512::lowrank_kernels(), site);
    if (one.size() != other.size()) return 2;
    double scale = 0.0, apart = 0.0;
    for (size_t i = 0; i < one.size(); ++i) {
      scale = std::fmax(scale, std::fabs(one[i]));
      apart = std::isfinite(other[i]) ? std::fmax(apart, std::fabs(one[i] - other[i])) : INFINITY;
    }
    worst = std::fmax(worst, apart / scale);
  }
  std::printf("%g\n", worst);
  return 0;
}
