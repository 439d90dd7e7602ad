// mode_contract, forward. Legend: K modes, R rank, O rows of V; T = fp32, fp16, bf16.
//
//   Tucker   M_k[a, b] = sum_c C[a, b, c] p_k[c];  PT[k, a, o] = s sum_b V[o, b] M_k[a, b];
//            without V: s M_k[a, b]
//   CP       PT[k, a, o] = s lambda[a] p_k[a] V[o, a];  without V: s diag(lambda * p_k)
//
// Shapes   C [R, R, R], modes [K, R], V [O, R] contiguous in T; PT [K, R, O] in any of the three.
// Grid     Tucker: (slabs a, groups of 64-column tiles of O): a block contracts C[a, :, :] with all
//          modes, keeps M[:, a, :] in shared memory and folds V onto it. CP: (32-column tiles of R,
//          64-column tiles of O, groups of 8 modes).
// Traffic  C from DRAM once (again from L2 by every further column group: as many groups as fill
//          the device), PT once; modes and V from L2. M_k is never stored.
// Numerics fp32 accumulators, one rounding at the store. With 16-bit inputs M enters the second
//          product as hi + lo (common/cuda/parts.cuh) on tensor cores; fp32 products are IEEE FMAs.
//          Fixed order of every sum: same bits on every run of a device.
// Limits   ceil(K / 64) ceil(R / 64) <= 4 (Tucker: M of one slab in shared memory), K <= 1024 (CP).
// Source   ops/mode_contract/reference.py: P_k = s V M_k^T.
#include "common/cuda/launchers.cuh"
#include "common/cuda/parts.cuh"
#include "common/cuda/pipeline.cuh"
#include "common/cuda/reduce.cuh"
#include "params.h"

namespace petal {
namespace {

// Both products work on 64 x 64 tiles; the ring holds an A and a B tile, of which the fold uses B
// only.
template <typename T>
struct ModeShape {
  static constexpr int kB = kModeTile, kD = kDepth<T>;
  using Contract = TileProduct<T, kB, kB, kD, true, true, 2, 2, 1>;
  using Fold = TileProduct<T, kB, kB, kD, true, true, 2, 2, 1, kPartLd<T>>;
  using Tiles = Ring<T, kTileElements<T, kB, kD>, kTileElements<T, kB, kD>>;
  static constexpr size_t kStageBytes = sizeof(float) * Stage<kB, kB>::kFloats;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    mode_contract_fwd_kernel(const __grid_constant__ ModeParams p) {
  using Shape = ModeShape<T>;
  using Out = Stage<kModeTile, kModeTile>;
  constexpr int kB = kModeTile, kD = Shape::kD;
  PETAL_SHARED(shared);
  const typename Shape::Tiles ring{reinterpret_cast<T*>(shared)};
  float* const stage = reinterpret_cast<float*>(shared + Shape::Tiles::kBytes);
  T* const blocks = reinterpret_cast<T*>(shared + Shape::Tiles::kBytes + Shape::kStageBytes);
  const int64_t slab = blockIdx.x, rank = p.rank;
  const int mode_tiles = static_cast<int>((p.modes_count + kB - 1) / kB),
            rank_tiles = static_cast<int>((rank + kB - 1) / kB);
  const int chunks = static_cast<int>((rank + kD - 1) / kD);
  const T* const core = static_cast<const T*>(p.core.data) + slab * rank * p.core.stride;
  const bool folds = p.up.data != nullptr;

  // Writes one staged tile of the result: rows are modes.
  const auto write = [&](int64_t mode0, int64_t col0) {
#pragma unroll
    for (int i = 0; i < Out::kPerThread; ++i) {
      const int64_t mode = mode0 + Out::row(i), col = col0 + Out::col(i);
      const int valid = mode < p.modes_count ? valid_columns(col, p.columns, 8) : 0;
      if (valid == 0) continue;
      float v[8];
      Out::template read<1>(v, stage, i);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] *= p.scale;
      store8_as(p.out, p.out_dtype, (mode * rank + slab) * p.columns + col, v, valid, p.out_vec);
    }
  };

  typename Shape::Contract contract;
  for (int tile = 0; tile < mode_tiles * rank_tiles; ++tile) {
    const int64_t mode0 = tile / rank_tiles * kB, b0 = tile % rank_tiles * kB;
    contract.clear();
    run_pipeline(
        chunks,
        [&](int64_t c) {
          load_tile<T, kB, kD>(ring.a(c), static_cast<const T*>(p.modes.data), p.modes.stride,
                               p.modes.vec, mode0, p.modes_count, c * kD, rank);
          load_tile<T, kB, kD>(ring.b(c), core, p.core.stride, p.core.vec, b0, rank, c * kD, rank);
        },
        [](int64_t) { return false; }, [&](int64_t c) { contract.step(ring.a(c), ring.b(c)); });
    contract.store(stage);
    __syncthreads();
    if (folds) {
      store_parts<T>(blocks + tile * kParts<T> * kPartElements<T>, stage);
    } else {
      write(mode0, b0);
    }
  }
  if (!folds) return;

  const int64_t first = blockIdx.y * p.columns_per_block, end = (p.columns + kB - 1) / kB;
  const int64_t last = first + p.columns_per_block < end ? first + p.columns_per_block : end;
  typename Shape::Fold fold;
  fold.clear();
  run_pipeline(
      (last - first) * mode_tiles * chunks,
      [&](int64_t i) {
        const int64_t col0 = (first + i / (mode_tiles * chunks)) * kB;
        load_tile<T, kB, kD>(ring.b(i), static_cast<const T*>(p.up.data), p.up.stride, p.up.vec,
                             col0, p.columns, i % chunks * kD, rank);
      },
      [](int64_t) { return false; },
      [&](int64_t i) {
        const int mode_tile = static_cast<int>(i / chunks % mode_tiles),
                  b = static_cast<int>(i % chunks) * kD;
        const T* const block =
            blocks + (mode_tile * rank_tiles + b / kB) * kParts<T> * kPartElements<T> + b % kB;
#pragma unroll
        for (int part = 0; part < kParts<T>; ++part)
          fold.step(block + part * kPartElements<T>, ring.b(i));
        if (i % chunks != chunks - 1) return;
        fold.store(stage);
        __syncthreads();
        write(static_cast<int64_t>(mode_tile) * kB, (first + i / (mode_tiles * chunks)) * kB);
        fold.clear();
      });
}

constexpr int kDiagonalRows = 32, kDiagonalColumns = 64, kDiagonalModes = 8;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    mode_diagonal_fwd_kernel(const __grid_constant__ ModeParams p) {
  PETAL_SHARED(shared);
  float* const tile = reinterpret_cast<float*>(shared);  // [32 ranks][65]: V transposed
  const int64_t a0 = static_cast<int64_t>(blockIdx.x) * kDiagonalRows,
                o0 = static_cast<int64_t>(blockIdx.y) * kDiagonalColumns;
  const T* const up = static_cast<const T*>(p.up.data);
  for (int i = threadIdx.x; i < kDiagonalRows * kDiagonalColumns; i += kThreads) {
    const int a = i % kDiagonalRows, o = i / kDiagonalRows;
    const int64_t rank = a0 + a, col = o0 + o;
    float v = 0.0f;
    if (rank < p.rank && col < p.columns)
      v = up != nullptr ? to_float(up[col * p.up.stride + rank]) : (rank == col ? 1.0f : 0.0f);
    tile[a * (kDiagonalColumns + 1) + o] = v;
  }
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.z) * kDiagonalModes;
  const int64_t last =
      first + kDiagonalModes < p.modes_count ? first + kDiagonalModes : p.modes_count;
  for (int64_t mode = first; mode < last; ++mode) {
    for (int i = threadIdx.x; i < kDiagonalRows * kDiagonalColumns / 8; i += kThreads) {
      const int a = i / (kDiagonalColumns / 8), o = i % (kDiagonalColumns / 8) * 8;
      const int64_t rank = a0 + a;
      const int valid = rank < p.rank ? valid_columns(o0 + o, p.columns, 8) : 0;
      if (valid == 0) continue;
      const float factor =
          to_float(static_cast<const T*>(p.core.data)[rank]) *
          to_float(static_cast<const T*>(p.modes.data)[mode * p.modes.stride + rank]);
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float element = tile[a * (kDiagonalColumns + 1) + o + j];
        v[j] = up != nullptr || element != 0.0f ? p.scale * factor * element
                                                : 0.0f;  // off the diagonal 0, whatever lambda is
      }
      store8_as(p.out, p.out_dtype, (mode * p.rank + rank) * p.columns + o0 + o, v, valid,
                p.out_vec);
    }
  }
}

}  // namespace

const char* launch_mode_contract_fwd(ModeParams params, void* stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Shape = ModeShape<T>;
    const int64_t rank_tiles = ceil_div(params.rank, kModeTile),
                  mode_tiles = ceil_div(params.modes_count, kModeTile);
    const int64_t column_tiles = ceil_div(params.columns, kModeTile);
    if (rank_tiles * mode_tiles > kMaxModeTiles)
      return "ceil(modes / 64) * ceil(rank / 64) is above 4";
    int64_t groups = 1;
    if (params.up.data != nullptr) {
      groups = ceil_div(multiprocessors(), params.rank);
      if (groups > column_tiles) groups = column_tiles;
    }
    params.columns_per_block = ceil_div(column_tiles, groups);
    if (params.up.data != nullptr) groups = ceil_div(column_tiles, params.columns_per_block);
    const size_t bytes = Shape::Tiles::kBytes + Shape::kStageBytes +
                         (params.up.data != nullptr ? rank_tiles * mode_tiles * kBlockBytes<T> : 0);
    return launch(&mode_contract_fwd_kernel<T>,
                  dim3(static_cast<unsigned>(params.rank), static_cast<unsigned>(groups)), bytes,
                  stream, params);
  });
}

const char* launch_mode_diagonal_fwd(const ModeParams& params, void* stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(ceil_div(params.rank, kDiagonalRows)),
                    static_cast<unsigned>(ceil_div(params.columns, kDiagonalColumns)),
                    static_cast<unsigned>(ceil_div(params.modes_count, kDiagonalModes)));
    return launch(&mode_diagonal_fwd_kernel<T>, grid,
                  sizeof(float) * kDiagonalRows * (kDiagonalColumns + 1), stream, params);
  });
}

}  // namespace petal
