// What the host side of gated_mlp hands to its CPU kernels.
#pragma once

#include "common/cpu/isa.h"

namespace petal {

struct MlpArgs {
  int64_t N, F, R;
  DType type;  // of all rows
  Activation activation;
  CpuRows g, u;  // u null: p = act(g)
  CpuRows p;     // forward
  CpuRows dp;    // backward: becomes dg; null: dg and du are not wanted
  CpuRows du;
  CpuRows dh;  // [N, R]; null: ddown is not wanted
  CpuDropout dropout;
  float* ddown;  // partials [splits][panels of F][R][kNR]
};

struct MlpKernels {
  CpuOperands operands;
  int64_t strip;  // columns of a backward task
  int64_t (*scratch)(const MlpArgs&);
  // Rows [row0, row1) of p.
  void (*forward)(const MlpArgs&, int64_t row0, int64_t row1);
  // Rows [row0, row1), a split's, and strip number `strip` of the columns.
  void (*backward)(const MlpArgs&, int64_t split, int64_t row0, int64_t row1, int64_t strip,
                   float* scratch);
};

PETAL_DECLARE_PER_ISA(const MlpKernels& mlp_kernels())

}  // namespace petal
