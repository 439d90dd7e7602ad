// What the host side of mode_contract hands to its CPU kernels. Packed operands are fp32 panels
// [ceil(cols / kNR)][depth][kNR].
#pragma once

#include "common/cpu/isa.h"

namespace petal {

struct ModeArgs {
  int64_t K, R, O;       // O: rows of up, or R without it
  bool diagonal;         // core is lambda [R], else C [R, R, R]
  DType in;              // dtype of core
  const void* core;      // contiguous
  const float* modes_t;  // p^T [R, K]: element (c, k)
  const float* modes;    // p [K, R]; backward only
  const float* up_t;     // V^T [R, O], or null
  const float* up;       // V [O, R]; backward only, or null
  float scale;
  DType out_type;
  void* out;         // forward: PT [K, R, O] or M [K, R, R], contiguous
  const void* dout;  // backward: the same shape, contiguous
  void* dcore;       // contiguous, in `in`, or null
  float* dmodes;     // partials [splits][panels of R][K][kNR], or null
  float* dup;        // dV^T partials [splits][panels of O][R][kNR], or null
};

struct ModeKernels {
  CpuOperands operands;
  int64_t (*scratch)(const ModeArgs&);
  // Slabs [a0, a1) of the core: all of out[:, a, :], or all gradients that flow through them.
  void (*forward)(const ModeArgs&, int64_t a0, int64_t a1, float* scratch);
  void (*backward)(const ModeArgs&, int64_t split, int64_t a0, int64_t a1, float* scratch);
};

PETAL_DECLARE_PER_ISA(const ModeKernels& mode_kernels())

}  // namespace petal
