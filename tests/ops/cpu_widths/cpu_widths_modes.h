// What cpu_widths.cpp runs of mode_contract.
#ifndef PETAL_CPU_WIDTHS_MODES_H
#define PETAL_CPU_WIDTHS_MODES_H

#include "cpu_widths.h"
#include "mode_contract/cpu/params.h"

namespace {

// Every result of a forward and a backward of 75 modes, rank 21, with or without an up-projection.
Results modes(const ModeKernels& kernel, bool diagonal, bool has_up) {
  constexpr int64_t kModes = 75, kUp = 83, kSplits = 2;
  const CpuOperands& ops = kernel.operands;
  const int64_t width = has_up ? kUp : kRank;
  const int64_t cells = diagonal ? kRank : kRank * kRank * kRank;
  const Floats core = numbers(cells, 1), p = numbers(kModes * kRank, 2),
               v = numbers(kUp * kRank, 3);
  const Floats dout = numbers(kModes * kRank * width, 4);
  Floats out(kModes * kRank * width), dcore(cells);
  const auto partial = [&](int64_t height, int64_t cols) {
    return Floats(kSplits * ((cols + ops.panel - 1) / ops.panel) * ops.panel * height);
  };
  Floats dmodes = partial(kModes, kRank), dup = partial(kRank, kUp);
  ModeArgs a = {};
  a.K = kModes, a.R = kRank, a.O = width, a.diagonal = diagonal, a.scale = 0.5f;
  a.in = a.out_type = DType::kFloat32, a.core = core.data();
  a.modes_t = Packed(ops, p, 1, kRank, kRank, kModes).data;
  a.modes = Packed(ops, p, kRank, 1, kModes, kRank).data;
  if (has_up) {
    a.up_t = Packed(ops, v, 1, kRank, kRank, kUp).data;
    a.up = Packed(ops, v, kRank, 1, kUp, kRank).data;
    a.dup = dup.data();
  }
  a.out = out.data(), a.dout = dout.data(), a.dcore = dcore.data(), a.dmodes = dmodes.data();
  float* scratch = aligned(kernel.scratch(a));
  constexpr int64_t kCuts[kSplits + 1] = {0, 13, kRank};
  for (int64_t split = 0; split < kSplits; ++split) {
    kernel.forward(a, kCuts[split], kCuts[split + 1], scratch);
  }
  for (int64_t split = 0; split < kSplits; ++split) {
    kernel.backward(a, split, kCuts[split], kCuts[split + 1], scratch);
  }
  Results all = {out, dcore, reduced(ops, dmodes, kSplits, kModes, kRank)};
  if (has_up) all.push_back(reduced(ops, dup, kSplits, kRank, kUp));
  return all;
}

}  // namespace

#endif
