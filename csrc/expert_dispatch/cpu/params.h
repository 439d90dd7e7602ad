// What the host side of expert_dispatch hands to its CPU kernels. Strides are in elements; a null
// pointer is an argument that is not there or a result that is not wanted.
//
// A group is what one product covers: stationary, all rows of a block and all experts side by side;
// sorted, one expert and the rows that chose it. Weights are packed fp32 panels
// [ceil(cols / kNR)][K][kNR] of the right operand named beside them, one per group.
#pragma once

#include "common/cpu/isa.h"

namespace petal {

struct ExpertArgs {
  DType type;
  int64_t N, D, R, O, E;
  int64_t downs;  // E, or 1: every expert reads one z
  int64_t top_k;  // at most so many experts are chosen by a row
  int64_t L;      // rows that share a row of given gates
  int64_t block;  // rows of a block
  int64_t blocks;
  Activation activation;
  ExpertGate gate;
  bool sorted, renormalize, add_input, up_biased;
  float keep, mix;

  CpuRows x, base;
  const float *gates, *noise;   // [N / L, E], [N, E] contiguous
  const uint8_t* given_choice;  // choice of given gates [N / L, E] contiguous
  float* logits;                // [N, E]: written by forward, read by backward
  uint8_t* chosen;              // topk [N, E]: likewise

  const float* const* down_t;         // forward: transposed, [D, r]
  const float* const* down_bias;      // forward: padded to whole panels
  const float* const* up_t;           // forward: transposed, [r, O], the biases below it
  const float* const* up;             // backward: [O, r]
  const float* const* down;           // backward: [r, D], stationary the router below it
  const float *router, *router_bias;  // [E, D], [E]
  const float* up_bias;               // backward: [E, O]

  CpuRows out;
  // z, stationary [N, downs * r]. Sorted it is [slots, r]: in forward a block's own slots from row
  // row0 * top_k on, with their rows in `order` and their numbers in `counts` [blocks, E]; in
  // backward in order of experts with offsets [E + 1].
  CpuRows z;
  int32_t* order;
  int32_t* counts;
  const int32_t* offsets;

  CpuRows dout, dx;
  bool need_t, need_gates;  // t = dout up; the gradients of gates and logits
  const float* dlogits;     // [N, E], of the losses
  // The left operands of the weight gradients, rows as in z, `*_ld` floats apart: mix g t act'(z),
  // then (stationary) the logits' gradient; mix ga, then mix g of each expert of the group.
  float *dz, *mixed;
  int64_t dz_ld, mixed_ld;
  float* dl;  // the logits' gradient: within dz, or (sorted) [N, dl_ld]
  int64_t dl_ld;
  float *dnoise, *dgates;  // [N, E]
};

// One weight gradient's product [cols, width] = A^T B over slots [begin, end).
struct ExpertSum {
  const float* a;
  int64_t lda, cols;
  CpuRows rows;  // B's; null: column sums of A alone, [1, cols]
  int64_t width;
  const int32_t* order;  // B's row of each slot; null: the slot itself
  int64_t begin, end;
};

struct ExpertKernels {
  CpuOperands operands;
  // Floats of scratch for one call of forward / backward / sum over `panels` panels.
  int64_t (*forward_scratch)(const ExpertArgs&);
  int64_t (*backward_scratch)(const ExpertArgs&);
  int64_t (*sum_scratch)(const ExpertSum&, int64_t panels);
  // One block of rows.
  void (*forward)(const ExpertArgs&, int64_t block, float* scratch);
  void (*backward)(const ExpertArgs&, int64_t block, float* scratch);
  // Panels [j0, j1) into the scratch's beginning: [panel][cols][kNR].
  void (*sum)(const ExpertSum&, DType, int64_t j0, int64_t j1, float* scratch);
};

PETAL_DECLARE_PER_ISA(const ExpertKernels& expert_kernels())

}  // namespace petal
