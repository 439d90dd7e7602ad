// What the host side of lowrank_linear hands to its CPU kernels. Strides are in elements, weights
// are packed fp32 panels [ceil(cols / kNR)][K][kNR] of the right operand named beside them.
#pragma once

#include "common/cpu/isa.h"

namespace petal {

enum class Site : int32_t { kBottleneck = 0, kInput = 1, kMode = 2 };

struct LowrankOutput {
  int64_t width;  // O_k
  int64_t R, at;  // its rank, and the first column of its part of h
  float scale;
  const float* up;      // forward P_k^T [R, O_k]; backward P_k [O_k, R]
  const float* down;    // forward A_k^T [D, R] where x has a mask; that of stream k
  const float* core;    // core_k [R, R], or null
  const float* core_t;  // core_k^T [R, R], backward only
  const float* weight;  // forward W_k^T [D, O_k]; backward W_k [O_k, D]; or null
  const float* bias;    // fp32, padded to whole panels, or null
  const void* base;     // [N, O_k], or null
  int64_t base_row;
  void* y;         // [N, O_k] contiguous
  const void* dy;  // [N, O_k]
  int64_t dy_row;
  float* dup;    // partials dP_k^T [splits][panels of O_k][R][kNR], or null
  float* dcore;  // partials [splits][panels of R][R][kNR], or null
};

struct LowrankArgs {
  int64_t N, D, K;
  int64_t middle;  // columns of h: R, or the sum of all where every output has its own
  bool own;        // every output has columns of h of its own
  int64_t block;   // rows of a block
  const void* x;   // [N, D], or null
  int64_t x_row;
  const void* hidden;  // [N, middle]: given, or saved by forward
  int64_t hidden_row;
  const float* down;  // forward U^T [D, middle]; backward U [middle, D], A_k one below the other
  LowrankOutput* outs;
  Site site;
  CpuDropout dropout;
  void* h;           // forward: [N, middle] contiguous, or null
  void* dx;          // backward: [N, D] contiguous, or null
  bool dx_has_base;  // dx already holds sum_k dy_k W_k
  void* dh;          // backward: [N, middle] contiguous, or null
  float* ddown;      // partials [splits][panels of D][middle][kNR], or null
  bool need_dh;      // any of dx's update, dU, dcore, dh
};

struct LowrankKernels {
  CpuOperands operands;
  // Floats of scratch for one call of forward / backward.
  int64_t (*forward_scratch)(const LowrankArgs&, DType);
  int64_t (*backward_scratch)(const LowrankArgs&, DType);
  void (*forward)(const LowrankArgs&, DType, int64_t row0, int64_t rows, float* scratch);
  // Rows [row0, row1) of split `split`, block after block.
  void (*backward)(const LowrankArgs&, DType, int64_t split, int64_t row0, int64_t row1,
                   float* scratch);
};

PETAL_DECLARE_PER_ISA(const LowrankKernels& lowrank_kernels())

}  // namespace petal
