// What the host side of gated_bottleneck hands to its CPU kernels. Strides are in elements, weights
// are packed fp32 panels [ceil(cols / kNR)][K][kNR] of the right operand named beside them, vectors
// fp32 padded with zeros to whole panels. A null pointer is an argument that is not there or a
// result that is not wanted.
#pragma once

#include "common/cpu/isa.h"

namespace petal {

struct GatedArgs {
  DType type;
  int64_t N, D, R, O, Dg, Rg, V;
  int64_t L;      // rows of a sample, N where nothing is per sample
  int64_t block;  // rows of a block
  Activation activation;
  Route route;
  Gate gate;
  bool route_relu;
  bool sees_output;     // middleX, small: the logit reads Y in place of H
  bool add_input;       // H is x
  bool add_gate_input;  // the residual is gate_input
  bool z_given;
  float scale, eps;
  CpuDropout dropout;

  CpuRows x, base, gate_input, residual;
  CpuRows z, zg;               // written by forward (z unless it is given), read by backward
  float *logits, *moments;     // [N], [N, 2]: written by forward, read by backward
  const float* token_weights;  // [N], or null: 1 / L each
  const void *left, *right;    // [B, V, R] contiguous, in the activations' dtype

  const float *down_t, *gate_down_t;  // forward: transposed, [D, R], [Dg, Rg]
  const float *up_t, *gate_up_t;      // both: transposed, [R, O], [Rg, O]
  const float *down, *gate_down;      // backward: [R, D], [Rg, Dg]
  const float *up, *gate_up;          // backward: [O, R], [O, Rg]
  const float *down_bias, *up_bias, *gate_down_bias, *gate_up_bias;
  const float* channel;              // middleY: G [O]
  const float *weight_x, *weight_h;  // middleX, small: [O] each
  const float* weight_a;             // where the logit reads Y: up^T w_h [R]
  const float* logit_bias;           // [1]; with w_h . up_bias where the logit reads Y
  const float *norm_weight, *norm_bias;

  CpuRows out;  // forward, [N, O] contiguous

  CpuRows dout;
  CpuRows dx, dbase, dgate_input, dresidual, dz;  // contiguous
  void *dleft, *dright;                           // [B, V, R] contiguous
  bool need_dz, need_dzg;
  // Partials [splits][panels of the last dim][first dim][kNR].
  float *ddown, *dup_t, *dgate_down, *dgate_up_t;  // [R, D], [R, O], [Rg, Dg], [Rg, O]
  float *ddown_bias, *dup_bias, *dgate_down_bias, *dgate_up_bias;
  float *dchannel, *dweight_x, *dweight_h, *dlogit_bias, *dnorm_weight, *dnorm_bias;
};

struct GatedKernels {
  CpuOperands operands;
  // Floats of scratch for one call of forward / backward.
  int64_t (*forward_scratch)(const GatedArgs&);
  int64_t (*backward_scratch)(const GatedArgs&);
  // At most a block of rows; gate small: whole samples, or one that is longer than a block.
  void (*forward)(const GatedArgs&, int64_t row0, int64_t row1, float* scratch);
  // The rows of split `split`, block after block; whole samples where anything is per sample.
  void (*backward)(const GatedArgs&, int64_t split, int64_t row0, int64_t row1, float* scratch);
};

PETAL_DECLARE_PER_ISA(const GatedKernels& gated_kernels())

}  // namespace petal
