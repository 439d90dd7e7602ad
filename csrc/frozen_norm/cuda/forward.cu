// frozen_norm, forward: y = xhat w' + b with xhat = x rho, of LayerNorm (x - mean) rho, and
// rho = 1 / sqrt(mean of squares + eps); w' = w or 1 + w.
//
// Shapes   x and y [N, D], unit stride in the last dim, any row stride; weight and bias [D]; moments
//          [N, 1] (rho) or [N, 2] (mean, rho), fp32.
// Grid     a warp owns a row of up to kNormWarpColumns columns, else a block does.
// Traffic  x once from DRAM and y once; the second walk of a row, and LayerNorm's third, find it in
//          L1 or L2. The moments once.
// Numerics fp32, sums in one order; y rounded once, with `rounded` the normalised row too.
// Limits   fp32, fp16, bf16; 2^31 blocks.
// Source   ops/frozen_norm/reference.py.
#include "row.cuh"

namespace petal {
namespace {

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads)
    frozen_norm_fwd_kernel(const __grid_constant__ NormParams p) {
  const Row<kLanes> row;
  if (row.index >= p.rows) return;
  const T* const x = at<T>(p.x, row.index, 0);
  const float width = static_cast<float>(p.width);
  float mean = 0.0f;
  if (p.centered) {
    float sum = 0.0f;
    for (int64_t c = row.first; c < p.width; c += row.kStep) {
      float v[8];
      load8<T>(v, x + c, valid_columns(c, p.width, 8), p.x.vec);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += v[j];
    }
    mean = row.sum(sum) / width;
  }
  float squares = 0.0f;
  for (int64_t c = row.first; c < p.width; c += row.kStep) {
    const int valid = valid_columns(c, p.width, 8);
    float v[8];
    load8<T>(v, x + c, valid, p.x.vec);
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += j < valid ? (v[j] - mean) * (v[j] - mean) : 0.0f;
  }
  const float rho = 1.0f / sqrtf(row.sum(squares) / width + p.eps);
  if (row.first == 0) {
    float* const moments = p.moments + row.index * (p.centered ? 2 : 1);
    moments[p.centered ? 1 : 0] = rho;
    if (p.centered) moments[0] = mean;
  }
  T* const y = at_out<T>(p.y, row.index, 0);
  for (int64_t c = row.first; c < p.width; c += row.kStep) {
    const int valid = valid_columns(c, p.width, 8);
    float v[8], factor[8], bias[8] = {};
    load8<T>(v, x + c, valid, p.x.vec);
    load_factor<T>(factor, p, c, valid);
    if (p.bias.data != nullptr)
      load8<T>(bias, static_cast<const T*>(p.bias.data) + c, valid, p.bias.vec);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float xhat = (v[j] - mean) * rho;
      if (p.rounded) xhat = to_float(from_float<T>(xhat));
      v[j] = xhat * factor[j] + bias[j];
    }
    store8<T>(y + c, v, valid, p.y.vec);
  }
}

}  // namespace

const char* launch_frozen_norm_fwd(const NormParams& params, void* stream) {
  return launch_rows(params, [&](auto tag, auto lanes, dim3 grid) {
    using T = typename decltype(tag)::type;
    return launch(&frozen_norm_fwd_kernel<T, decltype(lanes)::value>, grid, kNormShared, stream,
                  params);
  });
}

}  // namespace petal
