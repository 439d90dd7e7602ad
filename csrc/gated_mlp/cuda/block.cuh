// What the kernels of gated_mlp share: the tile of a block without a product, and the activation of
// eight columns.
#pragma once

#include "common/cuda/activation.cuh"
#include "common/cuda/tile.cuh"
#include "params.h"

namespace petal {

constexpr int kTileRows = 16, kTileColumns = 128;  // two groups of eight columns a thread
using Groups = Stage<kTileRows, kTileColumns>;

// The first element of a block's tile.
struct Corner {
  int64_t row, col;
};
__device__ __forceinline__ Corner corner(const MlpParams& p) {
  const int64_t across = (p.width + kTileColumns - 1) / kTileColumns;
  return {blockIdx.x / across * kTileRows, blockIdx.x % across * kTileColumns};
}
inline dim3 tiles(const MlpParams& p) {
  return dim3(static_cast<unsigned>(ceil_div(p.rows, kTileRows) * ceil_div(p.width, kTileColumns)));
}

// How many of eight columns at (row, col) there are.
__device__ __forceinline__ int valid_at(const MlpParams& p, int64_t row, int64_t col) {
  return row < p.rows ? valid_columns(col, p.width, 8) : 0;
}

template <typename T>
__device__ __forceinline__ void read8(float (&v)[8], const MatrixView& m, int64_t row, int64_t col,
                                      int valid) {
  load8<T>(v, at<T>(m, row, col), valid, m.vec);
}
template <typename T>
__device__ __forceinline__ void write8(const MatrixView& m, int64_t row, int64_t col,
                                       const float (&v)[8], int valid) {
  store8<T>(at_out<T>(m, row, col), v, valid, m.vec);
}

__device__ __forceinline__ void ones(float (&v)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = 1.0f;
}

// In place: g becomes p = act(g) u, u becomes du, d goes from dp to dg.
__device__ __forceinline__ void differentiate(Activation activation, float (&g)[8], float (&u)[8],
                                              float (&d)[8]) {
  by_activation(activation, [&](Activation known) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float a = activate(known, g[j]), slope = derivative(known, g[j]);
      const float factor = u[j], dp = d[j];
      g[j] = a * factor;
      u[j] = a * dp;
      d[j] = slope * (factor * dp);
    }
  });
}

}  // namespace petal
