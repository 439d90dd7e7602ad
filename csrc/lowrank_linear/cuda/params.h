// lowrank_linear on CUDA: what a launcher needs to know. Strides are int64 and in elements; every
// matrix has unit column stride. Legend: N rows (tokens), D input width, R rank, K outputs of
// widths O_k. Launchers return nullptr or the text of what went wrong.
#pragma once

#include "common/dispatch.h"

namespace petal {

constexpr int kMaxOutputs = 4;
constexpr int kMaxRank = 256;
constexpr int kMaxFusedRank = 64;  // update: the bottleneck of its rows is one tile
constexpr int kMaxJobs = kMaxOutputs + 1;

// out[N, R] = scale * sum_k mask_k * (drop(a_k) b_k^T): h (one pair: x, down) and dh (pairs: dy_k,
// ups[k]).
struct ShrinkParams {
  DType dtype;
  int64_t rows;
  int32_t rank, outputs;
  MatrixView a[kMaxOutputs];  // [N, widths[k]]
  int64_t widths[kMaxOutputs];
  MatrixView b[kMaxOutputs];  // [R, widths[k]] if b_rank_rows else [widths[k], R]
  bool b_rank_rows;
  MatrixView out;  // [N, R], or [N, K R] if separate
  bool separate;   // write every k to its own R columns in place of the sum
  float scale;
  Dropout dropout;
  bool mask_a;    // drop elements of a, stream 0
  bool mask_out;  // drop elements of term k, stream k
  bool small;     // 16-row blocks: enough of them for few rows
};

// out_k[N, O_k] = base_k + scale * mask * (drop_k(a_k) b_k^T): the update (a = h, b = ups) and dx
// (a = dh, b = down).
struct ExpandParams {
  DType dtype;
  int64_t rows;
  int32_t rank, outputs;
  MatrixView a[kMaxOutputs];  // [N, R]
  MatrixView b[kMaxOutputs];  // [O_k, R] if b_rank_columns else [R, O_k]
  bool b_rank_columns;
  MatrixView base[kMaxOutputs];  // [N, O_k]; data nullptr: zero; may be out itself
  MatrixView out[kMaxOutputs];   // [N, O_k]
  int64_t widths[kMaxOutputs];
  int64_t first_tile[kMaxOutputs + 1];  // column tiles before output k (filled by the launcher)
  float scale;
  Dropout dropout;
  bool mask_a;    // drop elements of a_k, stream k
  bool mask_out;  // drop elements of the product, stream 0 (outputs == 1)
};

// Shrink and expand in one launch for few rows: every block computes h of its own rows.
struct UpdateParams {
  ExpandParams expand;      // a[0] is h, written; mask_a as there; no mask_out
  MatrixView x, down;       // [N, D], [R, D]
  int64_t depth;            // D
  bool mask_x;              // drop elements of x, stream 0 (excludes expand.mask_a)
  int64_t tiles_per_block;  // column tiles of one block (filled by the launcher)
};

// out_j = scale_j * drop(big_j)^T drop(small_j) for all j in one grid, split over the rows.
struct ReduceJob {
  MatrixView big;    // [N, width]
  MatrixView small;  // [N, R]
  int64_t width;
  bool mask_big, mask_small;  // stream 0 for big, `stream` for small
  uint32_t stream;
  float scale;
  void* out;  // [width, R] at out_stride_width, out_stride_rank
  int64_t out_stride_width, out_stride_rank;
  DType out_dtype;
};
struct ParamGradParams {
  DType dtype;
  int64_t rows;
  int32_t rank, jobs;
  ReduceJob job[kMaxJobs];
  int64_t first_tile[kMaxJobs + 1], first_column[kMaxJobs + 1];  // filled by the launcher
  float* partial;                                                // [splits, sum of widths, R]
  int64_t splits, rows_per_split;  // rows_per_split: a multiple of the contraction depth (filled by
                                   // the launcher)
  Dropout dropout;
};

const char* launch_lowrank_shrink(const ShrinkParams& params, void* stream);
const char* launch_lowrank_expand(ExpandParams params, void* stream);
const char* launch_lowrank_update(UpdateParams params, void* stream);
const char* launch_lowrank_param_grad(ParamGradParams params, void* stream);

// Splits of the rows for launch_lowrank_param_grad: about two blocks per multiprocessor of the
// current device, each with at least 256 rows.
int64_t lowrank_splits(int64_t rows, const int64_t* widths, int jobs, int64_t rank);

}  // namespace petal
