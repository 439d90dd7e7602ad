// What the host side of frozen_norm hands to its CPU kernels.
#pragma once

#include "common/cpu/isa.h"

namespace petal {

struct NormArgs {
  int64_t N, D;
  DType type;     // of everything but the moments
  bool centered;  // LayerNorm: the mean is taken off
  bool rounded;   // the normalised row is rounded before the weight
  float offset;   // added to the weight
  float eps;      // forward
  CpuRows x;
  const void* weight;  // [D]; null: ones
  const void* bias;    // [D] or null; forward
  float* moments;      // [N, 2]: mean, rho = 1 / deviation; not centered: [N, 1], rho
  CpuRows y;           // forward
  CpuRows dy, dx;      // backward
};

// Rows [row0, row1).
struct NormKernels {
  void (*forward)(const NormArgs&, int64_t row0, int64_t row1);
  void (*backward)(const NormArgs&, int64_t row0, int64_t row1);
};

PETAL_DECLARE_PER_ISA(const NormKernels& norm_kernels())

}  // namespace petal
