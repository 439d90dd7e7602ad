// frozen_norm on CUDA: what a launcher needs to know. Launchers return nullptr or the text of what
// went wrong.
#pragma once

#include "common/dispatch.h"

namespace petal {

constexpr int64_t kNormWarpColumns =
    1024;  // rows up to this width are a warp's, wider ones a block's

struct NormParams {
  DType dtype;  // of everything but the moments
  int64_t rows, width;
  bool centered;      // LayerNorm: the mean is taken off
  bool rounded;       // the normalised row is rounded before the weight
  float offset;       // added to the weight
  float eps;          // forward
  MatrixView x;       // [N, D]
  MatrixView weight;  // [1, D]; data nullptr: ones
  MatrixView bias;    // [1, D] or nothing; forward
  float* moments;     // [N, 2]: mean, rho = 1 / deviation; not centered: [N, 1], rho
  MatrixView y;       // forward
  MatrixView dy, dx;  // backward
};

const char* launch_frozen_norm_fwd(const NormParams& params, void* stream);
const char* launch_frozen_norm_bwd(const NormParams& params, void* stream);

}  // namespace petal
