// expert_dispatch on CUDA: what a launcher needs to know. Strides are int64 and in elements; every
// matrix has unit column stride. Legend: N tokens, E experts, r rank of each, D input width, O
// output width, S slots (a token of an expert, sorted by expert); T = dtype.
#pragma once

#include <cstddef>

#include "common/dispatch.h"

namespace petal {

constexpr int kMaxExpertRank = 256, kMaxExperts = 64;

struct ExpertParams {
  DType dtype;
  int64_t rows, width, outs;
  int64_t tokens_per_gate;  // so many tokens share a row of `gates` and `chosen`
  int64_t slots;            // sorted: an upper bound of S
  int32_t experts, rank, top_k;
  Activation activation;
  ExpertGate gate;
  bool renormalize;
  bool shared;          // one down-projection for all experts
  MatrixView x;         // [N, D]
  MatrixView down, up;  // [E r, D], [O, E r] in T; down is [r, D] in forward where it is shared
  MatrixView z;         // stationary: [N, E r], or [N, r] where it is shared; sorted: [S, r]
  VectorView down_bias, up_bias, router, router_bias, noise, gates;  // contiguous, any shape
  float* logits;                                                     // [N, E]
  uint8_t* chosen;                           // [N / tokens_per_gate, E]; no address: every expert
  const int32_t *order, *offsets, *inverse;  // sorted: [S], [E + 1], [N, E] where it is chosen
  float keep, mix;
};

// The parts of a forward, in this order, in one launch or several.
struct ExpertFwdParams {
  ExpertParams f;
  MatrixView h, out;  // [N, O]; no h: zero; no out: stop before it
  bool form_logits;   // with the choice; else they are read
  bool form_z;
  bool by_slot;  // form z by slots, nothing else
};

struct ExpertRowsParams {
  ExpertParams f;
  MatrixView dout;
  MatrixView dz, ga;      // [N, E r] or [S, r]; ga = g act(z); no address: not wanted
  MatrixView dx;          // [N, D]
  float* dgates;          // [N, E]: in the end the gradient of the logits, where there are any
  float* gates;           // [N, E]: what f makes of them
  const float* dlogits;   // [N, E]: added to the logits' gradient
  bool form_dz, form_dx;  // form_dx: everything by token that follows dz
  bool by_slot;           // form dz by slots, nothing else
  bool adds_dout;         // H is x
};

// partial[splits, E, width, r] = in^T side, of each expert's tokens. Sorted: `in` by `order`.
struct ExpertProduct {
  MatrixView in, side;  // [N, width]; [N, E r] or [S, r]
  int64_t width;        // 0: not wanted
  float* partial;
};
struct ExpertWeightsParams {
  DType dtype;
  int64_t rows;
  int32_t experts, rank;
  const int32_t *order, *offsets;
  ExpertProduct product[2];
  int64_t splits;
  int64_t first_tile[2];  // filled by the launcher
};

// partial[splits, E, width] = sum over tokens of factor[token, e] in[token]; without factors the
// sums over each expert's slots.
struct ExpertSum {
  MatrixView in;
  DType dtype;
  int64_t width;
  const float* factor;
  float* partial;
};
constexpr int kMaxExpertSums = 3;
struct ExpertSumsParams {
  int64_t rows;
  int32_t experts, jobs;
  const int32_t* offsets;
  ExpertSum job[kMaxExpertSums];
  int64_t splits;
  int64_t first_tile[kMaxExpertSums + 1];  // filled by the launcher
};

// out[e] = scale * the sum over splits of partial[splits, E, rows, cols][:, e].
struct ExpertReduce {
  const float* partial;
  int64_t splits, split_stride, expert_stride;
  int64_t rows, cols;
  void* out;
  DType dtype;
  int64_t stride_expert, stride_row, stride_col;
  float scale;
  int32_t experts;
};
constexpr int kMaxExpertReduces = 2 + kMaxExpertSums;
struct ExpertReduceParams {
  ExpertReduce job[kMaxExpertReduces];
  int32_t jobs;
  int64_t first_tile[kMaxExpertReduces + 1];  // filled by the launcher
};

// Tokens by expert. counts: [blocks, E], scratch.
constexpr int kSortTokens = 1024;  // of a block
struct ExpertSortParams {
  const uint8_t* chosen;  // [N / tokens_per_gate, E]
  int64_t rows, tokens_per_gate, slots;
  int32_t experts;
  int32_t* counts;
  int32_t *order, *offsets, *inverse;
};

size_t expert_dispatch_fwd_bytes(DType dtype, int experts, int rank);
size_t expert_dispatch_bwd_weights_bytes(DType dtype);

const char* launch_expert_dispatch_fwd_sort(const ExpertSortParams& params, void* stream);
const char* launch_expert_dispatch_bwd_invert(const ExpertSortParams& params, void* stream);
const char* launch_expert_dispatch_fwd(const ExpertFwdParams& params, void* stream);
const char* launch_expert_dispatch_bwd_rows(const ExpertRowsParams& params, void* stream);
const char* launch_expert_dispatch_bwd_weights(ExpertWeightsParams params, void* stream);
const char* launch_expert_dispatch_bwd_sums(ExpertSumsParams params, void* stream);
const char* launch_expert_dispatch_bwd_reduce(ExpertReduceParams params, void* stream);

}  // namespace petal
