// gated_bottleneck: what the kernels of both directions do alike. A block holds the activations of
// kRows rows in shared memory and goes through the output columns in tiles of 128 bytes; on each it
// forms a up^T (and the large gate's product), stages them in fp32, and every thread finishes
// groups of eight columns.
#pragma once

#include "common/cuda/activation.cuh"
#include "common/cuda/launchers.cuh"
#include "common/cuda/pipeline.cuh"
#include "common/cuda/reduce.cuh"
#include "params.h"

namespace petal {

// Block shapes for ranks up to RANK. Tiles are kD elements (128 bytes) wide; an operand as wide as
// the rank is a sequence of them ("pieces").
template <typename T, int RANK>
struct GatedShape {
  static constexpr int kD = kDepth<T>, kPieces = RANK / kD;
  static constexpr int kRows = sizeof(T) == 4 && RANK > 128 ? 16 : 32;
  static constexpr int kSide = kTileElements<T, kRows, kD>, kSquare = kTileElements<T, kD, kD>;
  static constexpr size_t kSideBytes = sizeof(T) * kPieces * kSide,
                          kSquareBytes = sizeof(T) * kPieces * kSquare;
  using Out = Stage<kRows, kD>;
  static constexpr size_t kStageBytes = sizeof(float) * Out::kFloats;
  using Up = TileProduct<T, kRows, kD, kD, true, true, 2, 2, 1>;
  static constexpr size_t kColumnBytes = sizeof(float) * kColumns * kD;
  // Columns of z formed at once.
  static constexpr int kWide = sizeof(T) == 2 ? (RANK < 128 ? RANK : 128) : 64;
  using Down = TileProduct<T, kRows, kWide, kD, true, true, 2, 2, 1>;
  using Tiles = Ring<T, kSide, kTileElements<T, kWide, kD>>;
  using Hidden = Stage<kRows, kWide>;
};

// Per row of the block.
struct RowInfo {
  float gate, mean, rstd, mean_g, mean_gx, dlogit;
};

// Where column c of a row lies in the pieces of a bottleneck.
template <typename T, int RANK>
__device__ __forceinline__ int hidden_offset(int row, int c) {
  using Shape = GatedShape<T, RANK>;
  return c / Shape::kD * Shape::kSide + row * kLd<T, Shape::kD> + c % Shape::kD;
}

// Pieces of an activated bottleneck: tile = act(route(z)), zero where there is no row or rank; the
// route is element by element. In `copy`, where it has an address, the same for later kernels.
template <typename T, int RANK>
__device__ __forceinline__ void form_hidden(T* tile, unsigned char* scratch, const Bottleneck& b,
                                            Activation activation, Route route,
                                            const MatrixView& left, const MatrixView& copy,
                                            int64_t row0, int64_t rows, int64_t length) {
  using Shape = GatedShape<T, RANK>;
  using Hidden = typename Shape::Hidden;
  constexpr int kD = Shape::kD, kWide = Shape::kWide, kRows = Shape::kRows;
  const typename Shape::Tiles ring{reinterpret_cast<T*>(scratch)};
  float* const stage = reinterpret_cast<float*>(scratch);
#pragma unroll 1
  for (int rank0 = 0; rank0 < RANK; rank0 += kWide) {
    if (b.form && rank0 < b.rank) {
      typename Shape::Down product;
      product.clear();
      __syncthreads();  // the ring lies over what the block read last
      run_pipeline((b.width + kD - 1) / kD,
                   [&](int64_t t) {
                     load_tile<T, kRows, kD>(ring.a(t), at<T>(b.in, 0, 0), b.in.stride, b.in.vec,
                                             row0, rows, t * kD, b.width);
                     load_tile<T, kWide, kD>(ring.b(t), at<T>(b.weight, 0, 0), b.weight.stride,
                                             b.weight.vec, rank0, b.rank, t * kD, b.width);
                   },
                   [](int64_t) { return false; },
                   [&](int64_t t) { product.step(ring.a(t), ring.b(t)); });
      __syncthreads();
      product.store(stage);
      __syncthreads();
    }
#pragma unroll 1
    for (int i = 0; i < Hidden::kPerThread; ++i) {
      if (!Hidden::has(i)) continue;
      const int r = Hidden::row(i), c = rank0 + Hidden::col(i);
      const int64_t row = row0 + r;
      const int valid = row < rows ? valid_columns(c, b.rank, 8) : 0;
      float v[8] = {};
      if (valid > 0) {
        if (b.form) {
          Hidden::template read<1>(v, stage, i);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if (b.bias.data != nullptr && j < valid) v[j] += element<T>(b.bias, c + j);
            v[j] = to_float(from_float<T>(v[j]));  // what is saved is what is used
          }
          if (b.z.data != nullptr) store8<T>(at_out<T>(b.z, row, c), v, valid, b.z.vec);
        } else {
          load8<T>(v, at<T>(b.z, row, c), valid, b.z.vec);
        }
        float by[8] = {};
        if (route != Route::kNone) load8<T>(by, at<T>(left, row / length, c), valid, left.vec);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float q = route == Route::kMul ? v[j] * by[j] : v[j] + by[j];
          v[j] = j < valid ? activate(activation, q) : 0.0f;
        }
        if (copy.data != nullptr) store8<T>(at_out<T>(copy, row, c), v, valid, copy.vec);
      }
      store8<T>(tile + hidden_offset<T, RANK>(r, c), v, 8, true);
    }
  }
}

// The pieces of [kD rows, rank] of an up-projection.
template <typename T, int RANK>
__device__ __forceinline__ void load_pieces(T* tile, const MatrixView& m, int64_t row0,
                                            int64_t rows, int rank) {
  using Shape = GatedShape<T, RANK>;
#pragma unroll 1
  for (int c = 0; c < Shape::kPieces; ++c) {
    if (c * Shape::kD < rank)
      load_tile<T, Shape::kD, Shape::kD>(tile + c * Shape::kSquare, at<T>(m, 0, 0), m.stride, m.vec,
                                         row0, rows, c * Shape::kD, rank);
  }
}

// stage = a weight^T over all pieces; Product says how a piece of the weight lies.
template <typename T, int RANK, class Product>
__device__ __forceinline__ void multiply_pieces(float* stage, const T* a, const T* weight,
                                                int rank) {
  using Shape = GatedShape<T, RANK>;
  Product product;
  product.clear();
#pragma unroll 1
  for (int c = 0; c < Shape::kPieces; ++c) {
    if (c * Shape::kD < rank) product.step(a + c * Shape::kSide, weight + c * Shape::kSquare);
  }
  product.store(stage);
}

// The column vectors of a tile in fp32; the gate of middleY as it multiplies.
template <typename T, int RANK>
__device__ __forceinline__ void load_columns(float* columns, const GatedParams& p, int64_t col0) {
  constexpr int kD = GatedShape<T, RANK>::kD;
#pragma unroll 1
  for (int i = threadIdx.x; i < kColumns * kD; i += kThreads) {
    const VectorView v = p.columns[i / kD];
    const int64_t col = col0 + i % kD;
    float value = v.data != nullptr && col < p.outs ? element<T>(v, col) : 0.0f;
    if (i / kD == kGateColumn && p.kind == Gate::kMiddleY)
      value = 1.0f + (p.gate_linear ? value : sigmoid(value));
    columns[i] = value;
  }
}

__device__ __forceinline__ void read_column(float (&v)[8], const float* columns, int width,
                                            Column kind, int col) {
  const float* const p = columns + kind * width + col;
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    const Pack<float> pack = *reinterpret_cast<const Pack<float>*>(p + j);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[j + e] = pack.e[e];
  }
}

// Whether backward has to form Y.
__device__ __forceinline__ bool forms_values(const GatedParams& p) {
  return p.kind != Gate::kNone || p.columns[kNormWeight].data != nullptr;
}
__device__ __forceinline__ bool has_row_gate(const GatedParams& p) {
  return p.kind == Gate::kMiddleX || p.kind == Gate::kSmall;
}

// Where a thread's group of eight columns lies.
struct Place {
  int local_row, local_col, valid;
  int64_t row, col;
};

template <typename T, int RANK>
__device__ __forceinline__ Place place(int i, int64_t row0, int64_t end, int64_t col0,
                                       int64_t outs) {
  using Out = typename GatedShape<T, RANK>::Out;
  Place at;
  at.local_row = Out::row(i);
  at.local_col = Out::col(i);
  at.row = row0 + at.local_row;
  at.col = col0 + at.local_col;
  at.valid = Out::has(i) && at.row < end ? valid_columns(at.col, outs, 8) : 0;
  return at;
}

// Y and G of one group.
template <typename T, int RANK>
__device__ __forceinline__ void form_values(float (&y)[8], float (&gate)[8], const GatedParams& p,
                                            const float* stage, const float* gate_stage,
                                            const float* columns, const RowInfo& row,
                                            const Place& at_, int i) {
  using Out = typename GatedShape<T, RANK>::Out;
  constexpr int kD = GatedShape<T, RANK>::kD;
  float other[8];
  Out::template read<1>(y, stage, i);
  read_column(other, columns, kD, kUpBias, at_.local_col);
#pragma unroll
  for (int j = 0; j < 8; ++j) y[j] += other[j];
  if (p.h.data != nullptr) {
    load8<T>(other, at<T>(p.h, at_.row, at_.col), at_.valid, p.h.vec);
#pragma unroll
    for (int j = 0; j < 8; ++j) y[j] += other[j];
  }
  if (p.kind == Gate::kLarge) {
    Out::template read<1>(gate, gate_stage, i);
    read_column(other, columns, kD, kGateColumn, at_.local_col);
#pragma unroll
    for (int j = 0; j < 8; ++j) gate[j] = sigmoid(gate[j] + other[j]);
  } else if (p.kind == Gate::kMiddleY) {
    read_column(gate, columns, kD, kGateColumn, at_.local_col);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) gate[j] = row.gate;
  }
}

// Bit j: whether column j of the group is kept.
__device__ __forceinline__ uint32_t keep_bits(const GatedParams& p, const MaskSource& mask,
                                              const Place& at_) {
  return p.dropout.rng != nullptr ? mask.keep8(0, at_.row, at_.col) : 0xFFu;
}

// u = residual + scale G drop(Y) of one group.
template <typename T>
__device__ __forceinline__ void form_sum(float (&u)[8], const float (&y)[8], const float (&gate)[8],
                                         const GatedParams& p, uint32_t keep, const Place& at_) {
#pragma unroll
  for (int j = 0; j < 8; ++j) u[j] = 0.0f;
  if (p.residual.data != nullptr)
    load8<T>(u, at<T>(p.residual, at_.row, at_.col), at_.valid, p.residual.vec);
  const float scale = p.scale * p.dropout.scale;
#pragma unroll
  for (int j = 0; j < 8; ++j) u[j] += (keep >> j) & 1u ? scale * gate[j] * y[j] : 0.0f;
}

// What backward forms of one group; zero beyond the matrix. dy: G dv, where dv = scale drop(du);
// dgate: dv Y, the gradient of G, and of a large gate's the gradient of its logits.
struct Gradients {
  float dout[8], y[8], xhat[8], du[8], dy[8], dgate[8];
};

template <typename T, int RANK>
__device__ __forceinline__ void form_gradients(Gradients& g, const GatedParams& p,
                                               const MatrixView& dout, const float* stage,
                                               const float* gate_stage, const float* columns,
                                               const RowInfo& row, const MaskSource& mask,
                                               const Place& at_, int i) {
  const bool norm = p.columns[kNormWeight].data != nullptr;
  const uint32_t keep = keep_bits(p, mask, at_);
  const float scale = p.scale * p.dropout.scale;
  float gate[8];
  if (forms_values(p)) {
    form_values<T, RANK>(g.y, gate, p, stage, gate_stage, columns, row, at_, i);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) g.y[j] = 0.0f, gate[j] = 1.0f;
  }
  load8<T>(g.dout, at<T>(dout, at_.row, at_.col), at_.valid, dout.vec);
  if (norm) {
    float weight[8];
    form_sum<T>(g.xhat, g.y, gate, p, keep, at_);
    read_column(weight, columns, GatedShape<T, RANK>::kD, kNormWeight, at_.local_col);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      g.xhat[j] = (g.xhat[j] - row.mean) * row.rstd;
      g.du[j] = row.rstd * (g.dout[j] * weight[j] - row.mean_g - g.xhat[j] * row.mean_gx);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) g.du[j] = g.dout[j], g.xhat[j] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float dv = j < at_.valid && ((keep >> j) & 1u) ? scale * g.du[j] : 0.0f;
    g.dy[j] = dv * gate[j];
    g.dgate[j] = dv * g.y[j];
    if (p.kind == Gate::kLarge) g.dgate[j] *= gate[j] * (1.0f - gate[j]);
  }
}

// Instances by dtype and the larger of the two ranks.
template <class Fn>
const char* dispatch_gated(DType dtype, int rank, Fn fn) {
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (rank <= 64) return fn(TypeTag<T>{}, std::integral_constant<int, 64>{});
    if (rank <= 128) return fn(TypeTag<T>{}, std::integral_constant<int, 128>{});
    return fn(TypeTag<T>{}, std::integral_constant<int, 256>{});
  });
}

inline int widest_rank(const GatedParams& p) {
  return p.down.rank > p.gate.rank ? p.down.rank : p.gate.rank;
}

}  // namespace petal
