// The partial sums of one matrix, added in a launch of their own.
#pragma once

#include "reduce.cuh"

namespace petal {
namespace {

struct PartialsParams {
  const float* partial;  // [splits, rows, cols]
  int64_t splits, rows, cols;
  ReduceTarget target;
};

__global__ void __launch_bounds__(kThreads)
    partials_reduce_kernel(const __grid_constant__ PartialsParams p) {
  reduce_tile(p.partial, p.rows * p.cols, p.splits, p.rows, p.cols,
              static_cast<int64_t>(blockIdx.x) * kReduceTile,
              static_cast<int64_t>(blockIdx.y) * kReduceTile, p.target);
}

// target = scale * sum over the splits, in order.
inline const char* reduce_partials(const PartialsParams& params, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(params.rows, kReduceTile)),
                  static_cast<unsigned>(ceil_div(params.cols, kReduceTile)));
  return launch(&partials_reduce_kernel, grid, kReduceBytes, stream, params);
}

}  // namespace
}  // namespace petal
