// expert_dispatch: what the kernels of both directions do alike. A block owns 32 tokens, or 32
// slots of one expert, and does two kinds of product: `project` takes its rows, 64 columns of the
// bottlenecks at a time, down to a stage in fp32; `combine` forms an operand as wide as all
// bottlenecks that a token of the block chose, keeps it in shared memory and goes through the
// output in tiles of 64 columns. `inner` is E r, the columns of all bottlenecks side by side, and
// `depth` what a product sums over.
#pragma once

#include "common/cuda/activation.cuh"
#include "common/cuda/launchers.cuh"
#include "common/cuda/pipeline.cuh"
#include "common/cuda/reduce.cuh"
#include "params.h"

namespace petal {

template <typename T>
struct ExpertShape {
  static constexpr int kRows = 32, kWide = 64, kD = kDepth<T>;
  static constexpr int kSide = kTileElements<T, kRows, kD>, kWeight = kTileElements<T, kWide, kD>;
  static_assert(kTileElements<T, kD, kWide> <= kWeight, "either way round");
  static constexpr int kHold = 16;  // pieces of kD columns that an operand keeps; a wider one is
                                    // formed again for every tile of the output
  template <bool KC>
  using Product = TileProduct<T, kRows, kWide, kD, true, KC, 2, 2, 1>;
  using Out = Stage<kRows, kWide>;
  using Rows = Ring<T, kSide, kWeight>;
  using Weights = Ring<T, 0, kWeight>;
};

// Where a block works. expert: of its slots, or -1 where its rows are tokens.
struct ExpertSpan {
  int64_t first, end;
  int expert;
};

struct alignas(16) ExpertTile {
  int64_t token[32];    // -1: none
  uint64_t chosen[32];  // a bit per expert
  uint64_t any;
  int32_t pieces;  // that hold a chosen expert's columns
};

template <typename T>
struct ExpertMemory {
  using Shape = ExpertShape<T>;
  ExpertTile* tile;
  float *gates, *dgates, *columns, *stage;
  int* piece;
  T *hold, *weights;  // `project` has its ring over both

  static __host__ __device__ int pieces(int inner) { return (inner + Shape::kD - 1) / Shape::kD; }
  static __host__ __device__ int held(int inner) {
    return pieces(inner) < Shape::kHold ? pieces(inner) : Shape::kHold;
  }
  static size_t bytes(int experts, int inner) {
    const size_t fixed =
        sizeof(ExpertTile) + sizeof(float) * (experts * (2 * Shape::kRows + Shape::kWide) +
                                              Shape::Out::kFloats + (pieces(inner) + 3) / 4 * 4);
    const size_t held_bytes = sizeof(T) * held(inner) * Shape::kSide + Shape::Weights::kBytes;
    return fixed + (held_bytes > Shape::Rows::kBytes ? held_bytes : Shape::Rows::kBytes);
  }
  __device__ __forceinline__ ExpertMemory(unsigned char* shared, int experts, int inner) {
    tile = reinterpret_cast<ExpertTile*>(shared);
    gates = reinterpret_cast<float*>(shared + sizeof(ExpertTile));
    dgates = gates + experts * Shape::kRows;
    columns = dgates + experts * Shape::kRows;
    stage = columns + experts * Shape::kWide;
    piece = reinterpret_cast<int*>(stage + Shape::Out::kFloats);
    hold = reinterpret_cast<T*>(piece + (pieces(inner) + 3) / 4 * 4);
    weights = hold + held(inner) * Shape::kSide;
  }
};

// The block's rows and their tokens; false where an upper bound of a grid ends. The caller has to
// synchronise.
__device__ __forceinline__ bool find_rows(ExpertSpan& span, ExpertTile* tile, const ExpertParams& p,
                                          bool by_slot) {
  constexpr int kRows = 32;
  int64_t block = blockIdx.x;
  span.expert = -1;
  span.first = block * kRows;
  span.end = p.rows;
  if (by_slot) {
    for (int e = 0; e < p.experts && span.expert < 0; ++e) {
      const int64_t begin = p.offsets[e], end = p.offsets[e + 1],
                    tiles = (end - begin + kRows - 1) / kRows;
      if (block < tiles) {
        span.expert = e;
        span.first = begin + block * kRows;
        span.end = end;
      }
      block -= tiles;
    }
    if (span.expert < 0) return false;
  }
  if (threadIdx.x < kRows) {
    const int64_t row = span.first + threadIdx.x;
    tile->token[threadIdx.x] = row >= span.end ? -1 : by_slot ? p.order[row] : row;
  }
  return true;
}

// A bit for every expert with columns in [first, end).
__device__ __forceinline__ uint64_t experts_between(int first, int end, int rank) {
  return ~uint64_t{0} << (first / rank) & ~uint64_t{0} >> (63 - (end - 1) / rank);
}
__device__ __forceinline__ bool has_bit(uint64_t bits, int i) { return (bits >> i & 1u) != 0; }

// Eight elements of a contiguous tensor.
template <typename T>
__device__ __forceinline__ void load_vector(float (&v)[8], const VectorView& m, int64_t i,
                                            int valid) {
  if (m.wide) {
    const float* const p = static_cast<const float*>(m.data) + i;
    load8<float>(v, p, valid, reinterpret_cast<uintptr_t>(p) % 16 == 0);
  } else {
    const T* const p = static_cast<const T*>(m.data) + i;
    load8<T>(v, p, valid, reinterpret_cast<uintptr_t>(p) % 16 == 0);
  }
}

// load_tile of the rows that `row(r)` names; -1: zeros.
template <typename T, int ROWS, int COLS, class Row>
__device__ __forceinline__ void gather_tile(T* tile, const MatrixView& m, Row row, int64_t col0,
                                            int64_t cols) {
  constexpr int kChunks = COLS / kVec<T>;
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * kChunks; i += kThreads) {
    const int r = i / kChunks, c = (i % kChunks) * kVec<T>;
    T* const target = tile + r * kLd<T, COLS> + c;
    const int64_t from = row(r);
    const int valid = from >= 0 ? valid_columns(col0 + c, cols, kVec<T>) : 0;
    const T* const source = valid > 0 ? at<T>(m, from, col0 + c) : at<T>(m, 0, 0);
    if (m.vec) {
      cp_async_16(target, source, valid * static_cast<int>(sizeof(T)));
    } else {
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) target[j] = j < valid ? source[j] : from_float<T>(0.0f);
    }
  }
}

// 64 weights from `first` on, below `end`, at `depth` of the contraction: KC says that it runs
// along the rows of `m`.
template <typename T, bool KC>
__device__ __forceinline__ void load_weights(T* tile, const MatrixView& m, int64_t first,
                                             int64_t end, int64_t depth0, int64_t depth) {
  using Shape = ExpertShape<T>;
  if constexpr (KC) {
    load_tile<T, Shape::kWide, Shape::kD>(tile, at<T>(m, 0, 0), m.stride, m.vec, first, end, depth0,
                                          depth);
  } else {
    load_tile<T, Shape::kD, Shape::kWide>(tile, at<T>(m, 0, 0), m.stride,
                                          m.vec && first % kVec<T> == 0, depth0, depth, first, end);
  }
}

// stage = the block's rows of `in` times 64 weights from c0 on.
template <typename T, bool KC>
__device__ __forceinline__ void project(const ExpertMemory<T>& m, const MatrixView& in,
                                        const MatrixView& weight, int64_t depth, int c0, int end) {
  using Shape = ExpertShape<T>;
  const typename Shape::Rows ring{m.hold};
  typename Shape::template Product<KC> product;
  product.clear();
  run_pipeline((depth + Shape::kD - 1) / Shape::kD,
               [&](int64_t t) {
                 gather_tile<T, Shape::kRows, Shape::kD>(
                     ring.a(t), in, [&](int r) { return m.tile->token[r]; }, t * Shape::kD, depth);
                 load_weights<T, KC>(ring.b(t), weight, c0, end, t * Shape::kD, depth);
               },
               [](int64_t) { return false; },
               [&](int64_t t) { product.step(ring.a(t), ring.b(t)); });
  product.store(m.stage);
  __syncthreads();
}

// Columns c .. c + 7 of all bottlenecks of one token, wherever its plan keeps them: zero where an
// expert was not chosen, whose memory is not read.
template <typename T>
__device__ __forceinline__ void load_bottleneck(float (&v)[8], const ExpertParams& p,
                                                const MatrixView& m, int64_t token, uint64_t chosen,
                                                int c, int valid, bool shared) {
  int e = c / p.rank, own = c - e * p.rank;
  const auto source = [&]() {
    if (p.inverse != nullptr) return at<T>(m, p.inverse[token * p.experts + e], own);
    return at<T>(m, token, shared ? own : e * p.rank + own);
  };
  if (p.rank % 8 == 0) {
    valid = has_bit(chosen, e) ? valid : 0;
    load8<T>(v, valid > 0 ? source() : nullptr, valid, m.vec);
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    v[j] = j < valid && has_bit(chosen, e) ? to_float(*source()) : 0.0f;
    if (++own == p.rank) own = 0, ++e;
  }
}

// act(expert, column j of the group) for each of the eight columns from c on.
template <class Act>
__device__ __forceinline__ void each_expert(int c, int rank, Act act) {
  int e = c / rank, own = c - e * rank;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    act(e, j);
    if (++own == rank) own = 0, ++e;
  }
}

// The operand's pieces from the `first` that anyone chose on, as many as are kept.
template <typename T, class Operand>
__device__ __forceinline__ void hold_operand(const ExpertMemory<T>& m, int first, int inner,
                                             Operand operand) {
  using Shape = ExpertShape<T>;
  constexpr int kD = Shape::kD, kRows = Shape::kRows, kGroups = kD / 8;
  const int left = m.tile->pieces - first, count = left < Shape::kHold ? left : Shape::kHold;
#pragma unroll 1
  for (int i = threadIdx.x; i < count * kRows * kGroups; i += kThreads) {
    const int piece = i / (kRows * kGroups), row = i / kGroups % kRows, local = i % kGroups * 8,
              c = m.piece[first + piece] * kD + local;
    const int64_t token = m.tile->token[row];
    const int valid = token >= 0 ? valid_columns(c, inner, 8) : 0;
    float v[8] = {};
    if (valid > 0) operand(v, row, token, c, valid);
    store8<T>(m.hold + piece * Shape::kSide + row * kLd<T, kD> + local, v, 8, true);
  }
}

// 64 columns of [E, width] in fp32.
template <typename T>
__device__ __forceinline__ void load_columns(float* columns, const VectorView& vectors, int experts,
                                             int64_t col0, int64_t width) {
  constexpr int kWide = ExpertShape<T>::kWide;
  if (vectors.data == nullptr) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < experts * kWide; i += kThreads) {
    const int64_t col = col0 + i % kWide;
    columns[i] = col < width ? element<T>(vectors, i / kWide * width + col) : 0.0f;
  }
}

// finish(v, row of the block, token, column, valid columns, local column) for every group of eight
// columns of out = operand weight^T; operand(v, row, token, c, valid) gives eight of its columns.
// `vectors` [E, width] are in m.columns, a tile of them at a time. One pipeline over all tiles: the
// next tile's weights are copied while this one is finished.
template <typename T, bool KC, class Operand, class Finish>
__device__ __forceinline__ void combine(const ExpertMemory<T>& m, const MatrixView& weight,
                                        const VectorView& vectors, int experts, int inner,
                                        int64_t width, Operand operand, Finish finish) {
  using Shape = ExpertShape<T>;
  using Out = typename Shape::Out;
  constexpr int kD = Shape::kD, kWide = Shape::kWide, kHold = Shape::kHold;
  const typename Shape::Weights ring{m.weights};
  typename Shape::template Product<KC> product;
  const int pieces = m.tile->pieces, total = static_cast<int>((width + kWide - 1) / kWide) * pieces;
  __syncthreads();  // what the block wrote before, bottlenecks too, is there for all
  run_pipeline(
      total,
      [&](int64_t step) {
        const int tile = static_cast<int>(step) / pieces,
                  piece = m.piece[static_cast<int>(step) % pieces];
        load_weights<T, KC>(ring.b(step), weight, static_cast<int64_t>(tile) * kWide, width,
                            piece * kD, inner);
      },
      [](int64_t) { return false; },
      [&](int64_t step) {
        const int first = static_cast<int>(step) % pieces;
        const int64_t col0 = static_cast<int64_t>(static_cast<int>(step) / pieces) * kWide;
        if (first == 0) {
          product.clear();
          load_columns<T>(m.columns, vectors, experts, col0, width);
        }
        if (first % kHold == 0 && (step == 0 || pieces > kHold)) {
          hold_operand<T>(m, first, inner, operand);
          __syncthreads();
        }
        product.step(m.hold + first % kHold * Shape::kSide, ring.b(step));
        if (first + 1 < pieces) return;
        product.store(m.stage);
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < Out::kPerThread; ++i) {
          const int row = Out::row(i), local = Out::col(i);
          const int64_t token = m.tile->token[row], col = col0 + local;
          const int valid = token >= 0 ? valid_columns(col, width, 8) : 0;
          if (valid == 0) continue;
          float v[8];
          Out::template read<1>(v, m.stage, i);
          finish(v, row, token, col, valid, local);
        }
      });
}

// v += factor columns[e], eight columns.
__device__ __forceinline__ void add_columns(float (&v)[8], const float* columns, float factor) {
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    const Pack<float> pack = *reinterpret_cast<const Pack<float>*>(columns + j);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[j + e] += factor * pack.e[e];
  }
}

}  // namespace petal
