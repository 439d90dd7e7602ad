// What cpu_widths.cpp runs of frozen_norm.
#ifndef PETAL_CPU_WIDTHS_NORM_H
#define PETAL_CPU_WIDTHS_NORM_H

#include "cpu_widths.h"
#include "frozen_norm/cpu/params.h"

namespace {

// Every result of a forward and a backward of ragged rows.
Results norm(const NormKernels& kernel, bool centered, bool plus_one) {
  constexpr int64_t kWidth = 531;
  Floats x = numbers(kRows * kWidth, 1), dy = numbers(kRows * kWidth, 2);
  const Floats weight = numbers(kWidth, 3), bias = numbers(kWidth, 4);
  Floats y(kRows * kWidth), dx(kRows * kWidth), moments(kRows * (centered ? 2 : 1));
  NormArgs a = {};
  a.N = kRows, a.D = kWidth, a.type = DType::kFloat32, a.eps = 1e-5f;
  a.centered = centered, a.offset = plus_one;
  a.x = {x.data(), kWidth}, a.y = {y.data(), kWidth};
  a.dy = {dy.data(), kWidth}, a.dx = {dx.data(), kWidth};
  a.weight = weight.data(), a.moments = moments.data();
  if (centered) a.bias = bias.data();
  kernel.forward(a, 0, 77);
  kernel.forward(a, 77, kRows);
  kernel.backward(a, 0, 77);
  kernel.backward(a, 77, kRows);
  return {y, moments, dx};
}

}  // namespace

#endif
