// gated_bottleneck on CUDA: what a launcher needs to know. Strides are int64 and in elements; every
// matrix has unit column stride and dtype T. Legend: N rows (tokens), L rows of one sample, D input
// width, r rank, O output width, Dg and rg of the gate, B samples.
#pragma once

#include <cstddef>

#include "common/dispatch.h"

namespace petal {

constexpr int kMaxGatedRank = 256;

// The vectors over the output columns, loaded for a tile at a time.
enum Column { kUpBias, kGateColumn, kNormWeight, kNormBias, kInputWeight, kLogitHWeight, kColumns };

// One bottleneck: z = in weight^T + bias, formed here (and stored where z has an address) or read.
struct Bottleneck {
  MatrixView in, weight, z;  // [N, width], [rank, width], [N, rank]
  VectorView bias;
  int64_t width;
  int32_t rank;
  bool form;
};

struct GatedParams {
  DType dtype;
  int64_t rows, length, outs;
  Bottleneck down, gate;  // gate.rank is 0 unless the gate is large
  Activation activation;
  // kProduct: through one vision token, q = (f(z) . left) right, formed by forward's kernel. The
  // library forms every other product, here kNone.
  Route route;
  bool route_relu;         // product: f is relu, else the identity
  MatrixView left, right;  // [B, r]; right: product
  Gate kind;
  bool gate_linear;      // middleY: 1 + w in place of 1 + sigmoid(w)
  bool sees_output;      // middleX, small: Y in place of H; then weight_a = up^T w_h, fp32 [r]
  bool adds_gate_input;  // the residual is gate_input
  const float* weight_a;
  VectorView columns[kColumns];  // kGateColumn: the large gate's second bias, or w of middleY
  VectorView gate_bias;
  MatrixView h, gate_input, residual;  // [N, O]; h: Y = h + a up^T + up_bias; no address: zero
  MatrixView up, gate_up;              // [O, r], [O, rg]
  float scale, eps;
  Dropout dropout;
  float* logits;        // [N]: written in forward (may have no address), read in backward
  const float* pooled;  // small: [B], the gate
  float* moments;       // [N, 2]: as logits
  // Forward only.
  bool form_logits;
  MatrixView out;  // no address: stop after the bottlenecks and the logits
};

// What the rows leave for the weights: mean(g), mean(g xhat), dlogit (small before the pool: the
// sum of dv Y).
constexpr int kRowSums = 3;

struct GatedRowsParams {
  GatedParams f;
  MatrixView dout;
  float* sums;                     // [N, kRowSums]
  const float* totals;             // small: [B], the samples' sums
  const float* token_weights;      // small: [N]; no address: 1 / L
  MatrixView a, ag;                // [N, r], [N, rg]: stored where they have an address
  MatrixView dz, dzg, dq;          // the same; dq: before a multiplicative route
  MatrixView du, dh, dgate_input;  // [N, O], [N, O], [N, Dg]; no address: not wanted
  MatrixView dx;                   // [N, D]: dh (or nothing, if it lies elsewhere) + dz down
  bool form_sums, form_columns;
  bool need_dz, need_dzg;
  bool read_dz;   // dz comes from the library's part of a product; nothing but dx is left to do
  bool dx_on_dh;  // dx is dh's memory
};

// dup, dgate_up, the sums over rows of column vectors, and ddown, dgate_down, by row splits.
enum ColumnSum { kSumUpBias, kSumGate, kSumLogitH, kSumNormWeight, kSumNormBias, kColumnSums };

// partial[splits, width, rank] = in^T dz.
struct DownGrad {
  MatrixView in, dz;  // [N, width], [N, rank]
  int64_t width;      // 0: not wanted
  int32_t rank;
  float* partial;
};

struct GatedWeightsParams {
  GatedParams f;
  MatrixView dout;
  const float* sums;
  MatrixView a, ag;
  bool need_up, need_gate_up;
  uint32_t wanted;                      // bit per ColumnSum
  float *partial_up, *partial_gate_up;  // [splits, O, r], [splits, O, rg]
  float* partial_sums;                  // [splits, kColumnSums, O]
  DownGrad down[2];                     // of x, of gate_input
  int64_t splits;
  int64_t rows_per_split, first_tile[3];  // filled by the launcher; the tiles of down[0], down[1]
};

// target = sum over splits of partial [splits, rows, cols], split_stride elements apart.
struct GatedReduce {
  const float* partial;
  int64_t split_stride, rows, cols;
  void* out;
  DType dtype;
  int64_t stride_row, stride_col;
};
constexpr int kMaxReduces = 4 + kColumnSums;
struct GatedReduceParams {
  GatedReduce job[kMaxReduces];
  int32_t jobs;
  int64_t splits;
  int64_t first_tile[kMaxReduces + 1];  // filled by the launcher
};

// out[b] = sum over the tokens of sample b, in index order, of values (sigmoid: of weight times
// their sigmoid).
struct GatedPoolParams {
  const float* values;
  int64_t stride, samples, length;
  const float* token_weights;  // no address: 1 / L
  bool sigmoid;
  float* out;
};

// Shared memory of the largest block for these ranks.
size_t gated_bottleneck_fwd_bytes(DType dtype, int rank, int gate_rank);
size_t gated_bottleneck_bwd_rows_bytes(DType dtype, int rank, int gate_rank);
size_t gated_bottleneck_bwd_weights_bytes(DType dtype, int rank, int gate_rank);

const char* launch_gated_bottleneck_fwd(const GatedParams& params, void* stream);
const char* launch_gated_bottleneck_pool(const GatedPoolParams& params, void* stream);
const char* launch_gated_bottleneck_bwd_rows(const GatedRowsParams& params, void* stream);
const char* launch_gated_bottleneck_bwd_weights(GatedWeightsParams params, void* stream);
const char* launch_gated_bottleneck_bwd_reduce(GatedReduceParams params, void* stream);

}  // namespace petal
