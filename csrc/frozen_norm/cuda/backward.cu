// frozen_norm, backward: with g = dy w' (w' = w or 1 + w) and the normalised row xhat, formed again
// from x and the moments,
//
//   dx = rho (g - xhat mean(g xhat)), of LayerNorm rho (g - mean(g) - xhat mean(g xhat))
//
// Shapes   dy, x and dx [N, D], unit stride in the last dim, any row stride; weight [D]; moments
//          [N, 1] (rho) or [N, 2] (mean, rho), fp32.
// Grid     a warp owns a row of up to kNormWarpColumns columns, else a block does.
// Traffic  dy and x once from DRAM, dx once; the second walk of a row finds them in L1 or L2.
// Numerics fp32, sums in one order, one rounding.
// Limits   fp32, fp16, bf16; 2^31 blocks.
// Source   ops/frozen_norm/reference.py.
#include "row.cuh"

namespace petal {
namespace {

// g and xhat of eight columns.
template <typename T>
struct Columns {
  float g[8], xhat[8];

  __device__ __forceinline__ Columns(const NormParams& p, int64_t row, int64_t col, int valid,
                                     float mean, float rho) {
    float factor[8];
    load8<T>(g, at<T>(p.dy, row, col), valid, p.dy.vec);
    load8<T>(xhat, at<T>(p.x, row, col), valid, p.x.vec);
    load_factor<T>(factor, p, col, valid);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      g[j] = j < valid ? g[j] * factor[j] : 0.0f;
      xhat[j] = (xhat[j] - mean) * rho;
    }
  }
};

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads)
    frozen_norm_bwd_kernel(const __grid_constant__ NormParams p) {
  const Row<kLanes> row;
  if (row.index >= p.rows) return;
  const float* const moments = p.moments + row.index * (p.centered ? 2 : 1);
  const float mean = p.centered ? moments[0] : 0.0f, rho = moments[p.centered ? 1 : 0];
  const float width = static_cast<float>(p.width);
  float sum_g = 0.0f, sum_gx = 0.0f;
  for (int64_t c = row.first; c < p.width; c += row.kStep) {
    const int valid = valid_columns(c, p.width, 8);
    const Columns<T> at(p, row.index, c, valid, mean, rho);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sum_g += at.g[j];
      sum_gx += j < valid ? at.g[j] * at.xhat[j] : 0.0f;
    }
  }
  const float mean_gx = row.sum(sum_gx) / width;
  const float mean_g = p.centered ? row.sum(sum_g) / width : 0.0f;
  for (int64_t c = row.first; c < p.width; c += row.kStep) {
    const int valid = valid_columns(c, p.width, 8);
    const Columns<T> at(p, row.index, c, valid, mean, rho);
    float dx[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) dx[j] = (at.g[j] - at.xhat[j] * mean_gx - mean_g) * rho;
    store8<T>(at_out<T>(p.dx, row.index, c), dx, valid, p.dx.vec);
  }
}

}  // namespace

const char* launch_frozen_norm_bwd(const NormParams& params, void* stream) {
  return launch_rows(params, [&](auto tag, auto lanes, dim3 grid) {
    using T = typename decltype(tag)::type;
    return launch(&frozen_norm_bwd_kernel<T, decltype(lanes)::value>, grid, kNormShared, stream,
                  params);
  });
}

}  // namespace petal
