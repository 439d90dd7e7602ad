// gated_mlp on CUDA: what a launcher needs to know. Rows have unit column stride and any row
// stride. Legend: N rows, F width between the linears, R rank of the last linear's update.
// Launchers return nullptr or the text of what went wrong.
#pragma once

#include "common/dispatch.h"

namespace petal {

struct MlpParams {
  DType dtype;  // of all rows
  Activation activation;
  int64_t rows, width, rank;  // N, F, R
  MatrixView g, u;            // u without data: p = act(g)
  MatrixView p;               // forward
  MatrixView dp;              // backward: becomes dg; no data: dg and du are not wanted
  MatrixView du;
  MatrixView dh;    // [N, R]; no data: ddown is not wanted
  Dropout dropout;  // on p, as ddown sees it
  void* ddown;      // [R, F], contiguous
  DType ddown_dtype;
  int64_t splits;          // of the rows
  float* partial;          // [splits, F, R]
  int64_t rows_per_split;  // filled by the launcher
};

const char* launch_gated_mlp_act_fwd(const MlpParams& params, void* stream);
const char* launch_gated_mlp_act_bwd(MlpParams params, void* stream);

}  // namespace petal
