// What cpu_widths.cpp runs of gated_mlp.
#ifndef PETAL_CPU_WIDTHS_MLP_H
#define PETAL_CPU_WIDTHS_MLP_H

#include "cpu_widths.h"
#include "gated_mlp/cpu/params.h"

namespace {

// Every result of a forward and a backward of two splits and some strips, masked, of each
// activation, gated or plain.
Results mlp(const MlpKernels& kernel, Activation activation, bool gated) {
  constexpr int64_t kWidth = 531, kSplits = 2;
  const CpuOperands& ops = kernel.operands;
  Floats g = numbers(kRows * kWidth, 1), u = numbers(kRows * kWidth, 2);
  Floats dp = numbers(kRows * kWidth, 3), dh = numbers(kRows * kRank, 4);
  Floats p(kRows * kWidth), du(gated ? kRows * kWidth : 0);
  Floats ddown(kSplits * ((kWidth + ops.panel - 1) / ops.panel) * ops.panel * kRank);
  MlpArgs a = {};
  a.N = kRows, a.F = kWidth, a.R = kRank, a.type = DType::kFloat32, a.activation = activation;
  a.g = {g.data(), kWidth}, a.p = {p.data(), kWidth};
  a.dp = {dp.data(), kWidth}, a.dh = {dh.data(), kRank};
  if (gated) a.u = {u.data(), kWidth}, a.du = {du.data(), kWidth};
  a.dropout = {12345, 6, 20000, 1.5f}, a.ddown = ddown.data();
  float* scratch = aligned(kernel.scratch(a));
  constexpr int64_t kCuts[kSplits + 1] = {0, 77, kRows};
  for (int64_t s = 0; s < kSplits; ++s) {
    kernel.forward(a, kCuts[s], kCuts[s + 1]);
    for (int64_t strip = 0; strip * kernel.strip < kWidth; ++strip) {
      kernel.backward(a, s, kCuts[s], kCuts[s + 1], strip, scratch);
    }
  }
  std::free(scratch);
  Results all = {p, dp, reduced(ops, ddown, kSplits, kRank, kWidth)};
  if (gated) all.push_back(du);
  return all;
}

}  // namespace

#endif
