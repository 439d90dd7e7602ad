// lowrank_linear on CUDA: what a launcher needs to know. Strides are int64 and in elements; every
// matrix has unit column stride. Legend: N rows (tokens), D input width, R rank, K outputs of
// widths O_k and ranks R_k: all R, or each its own. Launchers return nullptr or the text of what
// went wrong.
#pragma once

#include "common/dispatch.h"

namespace petal {

constexpr int kMaxOutputs = 4;
constexpr int kMaxRank = 256;
constexpr int kMaxFusedRank = 64;  // update: the bottleneck of its rows is one tile
constexpr int kMaxJobs = 2 * kMaxOutputs;
constexpr int kSlot = 16;  // columns: each of several ranks side by side begins such a slot

// out[N, R] = sum_k scale_k * mask_k * (drop(a_k) b_k^T): h (one pair: x, down) and dh (pairs:
// dy_k, ups[k]). Or every term in columns of its own (separate), and (own) with one a for all,
// dropped by each term's own mask: the h_k of own down-projections.
struct ShrinkParams {
  DType dtype;
  int64_t rows;
  int32_t outputs, ranks[kMaxOutputs];  // ranks: equal where terms are summed
  MatrixView a[kMaxOutputs];            // [N, widths[k]]; a[0] alone if own
  int64_t widths[kMaxOutputs];
  MatrixView b[kMaxOutputs];  // [R_k, widths[k]] if b_rank_rows (as own wants it) else transposed
  bool b_rank_rows;
  MatrixView out;                       // [N, R], or [N, sum of R_k]
  int32_t offsets[kMaxOutputs];         // first column of term k
  int32_t first_slot[kMaxOutputs + 1];  // own: slots before term k (filled by the launcher)
  bool separate, own;
  bool apart;  // a sum whose terms differ in mask or scale
  float scales[kMaxOutputs];
  Dropout dropout;
  bool mask_a;    // drop elements of a: stream 0, own: stream k
  bool mask_out;  // drop elements of term k, stream k
  bool small;     // 16-row blocks: enough of them for few rows
};

// out_k[N, O_k] = base_k + scale_k * mask * (drop_k(a_k) b_k^T): the update (a = h, b = ups) and dx
// (a = dh, b = down). With several terms there is one output, out_0 = base_0 + scale_0 * sum_k
// mask_k * (a_k b_k^T): dx of own down-projections.
struct ExpandParams {
  DType dtype;
  int64_t rows;
  int32_t outputs, terms;  // terms: how many pairs are summed, where several are
  int32_t ranks[kMaxOutputs];
  MatrixView a[kMaxOutputs];  // [N, R_k]
  MatrixView b[kMaxOutputs];  // [O_k, R_k] if b_rank_columns else (as terms want it) [R_k, O_k]
  bool b_rank_columns;
  MatrixView base[kMaxOutputs];  // [N, O_k]; data nullptr: zero; may be out itself
  MatrixView out[kMaxOutputs];   // [N, O_k]
  int64_t widths[kMaxOutputs];
  int64_t first_tile[kMaxOutputs + 1];  // column tiles before output k (filled by the launcher)
  float scales[kMaxOutputs];
  Dropout dropout;
  bool mask_a;    // drop elements of a_k, stream k
  bool mask_out;  // drop elements of the product (outputs == 1): stream 0, of term k stream k
};

// Shrink and expand in one launch for few rows: every block computes h of its own rows.
struct UpdateParams {
  ExpandParams expand;            // a[k] is h, or h_k, written; mask_a as there; no mask_out
  MatrixView x;                   // [N, D]
  MatrixView downs[kMaxOutputs];  // [R_k, D]; all the same unless own
  int64_t depth;                  // D
  bool own;                       // a down-projection, and a part of h, of every output's own
  bool mask_x;              // drop elements of x: stream 0, own: stream k (excludes expand.mask_a)
  int64_t tiles_per_block;  // column tiles of one block (filled by the launcher)
};

// out_j = scale_j * drop(big_j)^T drop(small_j) for all j in one grid, split over the rows.
struct ReduceJob {
  MatrixView big;    // [N, width]
  MatrixView small;  // [N, rank]
  int64_t width;
  int32_t rank;
  bool mask_big, mask_small;  // one of them, by `stream`
  uint32_t stream;
  float scale;
  void* out;  // [width, rank] at out_stride_width, out_stride_rank
  int64_t out_stride_width, out_stride_rank;
  DType out_dtype;
};
struct ParamGradParams {
  DType dtype;
  int64_t rows;
  int32_t jobs;
  ReduceJob job[kMaxJobs];
  Dropout dropout;
  int64_t splits;  // 0: plan_param_grad chooses
  float* partial;  // [splits, partial_stride]
  // Filled by plan_param_grad. Neighbouring jobs with one big are a group, which reads it once for
  // all: their smalls lie side by side in slots.
  int32_t groups, first_job[kMaxJobs + 1];          // of each group
  int32_t first_slot[kMaxJobs];                     // slots of its group before job j
  int64_t first_element[kMaxJobs], partial_stride;  // of one split's partials
  // Filled by the launcher: tiles before each group, then before each job; rows of a split, a
  // multiple of the contraction depth.
  int64_t first_tile[kMaxJobs + 1], rows_per_split;
};

const char* launch_lowrank_shrink(ShrinkParams params, void* stream);
const char* launch_lowrank_expand(ExpandParams params, void* stream);
const char* launch_lowrank_update(UpdateParams params, void* stream);

// First the plan: groups, elements of the partials, and the splits of the rows: about two blocks
// per multiprocessor of the current device, each with at least 256 rows.
void plan_param_grad(ParamGradParams& params);
const char* launch_lowrank_param_grad(ParamGradParams params, void* stream);

}  // namespace petal
