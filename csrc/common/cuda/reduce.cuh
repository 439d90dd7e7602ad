// The second stage of every split reduction: fp32 partials summed in a fixed order and rounded
// once; and the sum of a warp.
#pragma once

#include "common/dispatch.h"
#include "vec.cuh"

namespace petal {

constexpr int kReduceTile = 32;
constexpr size_t kReduceBytes = sizeof(float) * kReduceTile * (kReduceTile + 1);

struct ReduceTarget {
  void* data;
  DType dtype;
  int64_t stride_row, stride_col;
  float scale;
};

// target[r, c] = scale * sum_s partial[s][r][c] for one 32 x 32 tile, s ascending; partial is
// [splits][rows][cols] with `split_stride` elements from split to split. Columns are read side by
// side; a target whose rows are adjacent in memory is written through shared memory.
__device__ __forceinline__ void reduce_tile(const float* partial, int64_t split_stride,
                                            int64_t splits, int64_t rows, int64_t cols,
                                            int64_t row0, int64_t col0,
                                            const ReduceTarget& target) {
  PETAL_SHARED(shared);
  float* const tile = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x % kReduceTile, line = threadIdx.x / kReduceTile;
  constexpr int kLines = kThreads / kReduceTile;
  for (int r = line; r < kReduceTile; r += kLines) {
    const int64_t row = row0 + r, col = col0 + lane;
    float sum = 0.0f;
    if (row < rows && col < cols) {
      for (int64_t s = 0; s < splits; ++s) sum += partial[s * split_stride + row * cols + col];
    }
    tile[r * (kReduceTile + 1) + lane] = sum * target.scale;
  }
  __syncthreads();
  const bool along_rows = target.stride_row == 1;
  for (int i = line; i < kReduceTile; i += kLines) {
    const int r = along_rows ? lane : i, c = along_rows ? i : lane;
    const int64_t row = row0 + r, col = col0 + c;
    if (row < rows && col < cols)
      store_as(target.data, target.dtype, row * target.stride_row + col * target.stride_col,
               tile[r * (kReduceTile + 1) + c]);
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, mask);
  return v;
}

}  // namespace petal
