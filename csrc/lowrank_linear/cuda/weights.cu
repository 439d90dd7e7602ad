// lowrank_linear, the reductions over rows. Legend: N rows, R rank, C_j columns of the wide operand
// of job j; T = fp32, fp16, bf16.
//
//   out_j[C_j, R] = s_j drop(big_j)^T drop(small_j)
//   dP_k: big = dy_k, small = m_k;   dU^T: big = x, small = dh;   dcore_k^T: big = g_k, small = h
//
// Shapes   big_j [N, C_j] and small_j [N, R] row-major with any row stride; out_j at any two
//          strides, in T or fp32: both layouts of a parameter.
// Grid     param_grad: (64-column tiles of all jobs, tiles of R, splits of the rows);
//          reduce: (32 x 32 tiles of all outputs).
// Traffic  big_j from DRAM once (read once per 64 columns of R, in fp32 per 32), small_j once per
//          column tile from L2, fp32 partials [splits, sum C_j, R] written and read once (in L2).
// Numerics fp32 accumulators and partials; the second stage adds the splits in ascending order and
//          rounds once: no atomics, same bits on every run of a device. Masks are drawn again from
//          (seed, offset); dropped elements are exact zeros, the factor of the kept ones is in s_j.
// Limits   at most 5 jobs (4 outputs and the shared down-projection), R <= 256.
// Source   ops/lowrank_linear/reference.py: dP_k = s dy_k^T m_k, dU = dh^T drop(x).
#include "common/cuda/launchers.cuh"
#include "common/cuda/pipeline.cuh"
#include "common/cuda/reduce.cuh"
#include "params.h"

namespace petal {
namespace {

constexpr int kColumns = 64;  // of the wide operand per block

template <typename T>
struct ParamGradShape {
  static constexpr int kBN = sizeof(T) == 2 ? 64 : 32, kD = kDepth<T>;
  using Product = TileProduct<T, kColumns, kBN, kD, false, false, 2, 2, 1>;
  using Tiles = Ring<T, kTileElements<T, kD, kColumns>, kTileElements<T, kD, kBN>>;
  static constexpr size_t kStageBytes = sizeof(float) * Stage<kColumns, kBN>::kFloats;
  static constexpr size_t kShared = Tiles::kBytes > kStageBytes ? Tiles::kBytes : kStageBytes;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    lowrank_param_grad_kernel(const __grid_constant__ ParamGradParams p) {
  using Shape = ParamGradShape<T>;
  using Out = Stage<kColumns, Shape::kBN>;
  constexpr int kBN = Shape::kBN, kD = Shape::kD;
  PETAL_SHARED(shared);
  const typename Shape::Tiles ring{reinterpret_cast<T*>(shared)};
  float* const stage = reinterpret_cast<float*>(shared);
  int j = 0;
  while (static_cast<int64_t>(blockIdx.x) >= p.first_tile[j + 1]) ++j;
  const MatrixView big = p.job[j].big, small = p.job[j].small;
  const int64_t width = p.job[j].width;
  const bool mask_big = p.job[j].mask_big, mask_small = p.job[j].mask_small;
  const uint32_t stream = p.job[j].stream;
  const int64_t col0 = (static_cast<int64_t>(blockIdx.x) - p.first_tile[j]) * kColumns,
                rank0 = static_cast<int64_t>(blockIdx.y) * kBN;
  const int64_t row0 = blockIdx.z * p.rows_per_split;
  const int64_t end = row0 + p.rows_per_split < p.rows ? row0 + p.rows_per_split : p.rows;
  const MaskSource mask = mask_source(p.dropout);

  typename Shape::Product product;
  product.clear();
  run_pipeline(
      end > row0 ? (end - row0 + kD - 1) / kD : 0,
      [&](int64_t tile) {
        const int64_t row = row0 + tile * kD;
        load_tile<T, kD, kColumns>(ring.a(tile), static_cast<const T*>(big.data), big.stride,
                                   big.vec, row, end, col0, width);
        load_tile<T, kD, kBN>(ring.b(tile), static_cast<const T*>(small.data), small.stride,
                              small.vec, row, end, rank0, p.rank);
      },
      [&](int64_t tile) {
        const int64_t row = row0 + tile * kD;
        if (mask_big) mask_tile<T, kD, kColumns>(ring.a(tile), mask, 0, row, col0);
        if (mask_small) mask_tile<T, kD, kBN>(ring.b(tile), mask, stream, row, rank0);
        return mask_big || mask_small;
      },
      [&](int64_t tile) { product.step(ring.a(tile), ring.b(tile)); });
  __syncthreads();  // the stage lies over the ring
  product.store(stage);
  __syncthreads();
  const int64_t columns = p.first_column[p.jobs];
  float* const partial = p.partial + (blockIdx.z * columns + p.first_column[j]) * p.rank;
#pragma unroll
  for (int i = 0; i < Out::kPerThread; ++i) {
    if (!Out::has(i)) continue;
    const int64_t col = col0 + Out::row(i), rank = rank0 + Out::col(i);
    const int valid = col < width ? valid_columns(rank, p.rank, 8) : 0;
    float v[8];
    Out::template read<1>(v, stage, i);
    if (valid > 0) store8<float>(partial + col * p.rank + rank, v, valid, p.rank % 4 == 0);
  }
}

// out_j = s_j * sum over splits of the partials, written along whichever stride of the parameter
// is 1.
__global__ void __launch_bounds__(kThreads)
    lowrank_param_reduce_kernel(const __grid_constant__ ParamGradParams p) {
  int j = 0;
  while (static_cast<int64_t>(blockIdx.x) >= p.first_tile[j + 1]) ++j;
  const int64_t col0 = (static_cast<int64_t>(blockIdx.x) - p.first_tile[j]) * kReduceTile,
                rank0 = static_cast<int64_t>(blockIdx.y) * kReduceTile;
  const ReduceTarget target{p.job[j].out, p.job[j].out_dtype, p.job[j].out_stride_width,
                            p.job[j].out_stride_rank, p.job[j].scale};
  reduce_tile(p.partial + p.first_column[j] * p.rank, p.first_column[p.jobs] * p.rank, p.splits,
              p.job[j].width, p.rank, col0, rank0, target);
}

void fill_tiles(ParamGradParams& p, int64_t tile) {
  p.first_tile[0] = p.first_column[0] = 0;
  for (int j = 0; j < p.jobs; ++j) {
    p.first_tile[j + 1] = p.first_tile[j] + ceil_div(p.job[j].width, tile);
    p.first_column[j + 1] = p.first_column[j] + p.job[j].width;
  }
}

}  // namespace

int64_t lowrank_splits(int64_t rows, const int64_t* widths, int jobs, int64_t rank) {
  int64_t tiles = 0;
  for (int j = 0; j < jobs; ++j) tiles += ceil_div(widths[j], kColumns);
  tiles *= ceil_div(rank, kColumns);
  const int64_t wanted = ceil_div(2 * multiprocessors(), tiles > 0 ? tiles : 1),
                most = ceil_div(rows, 256);
  return wanted < most ? wanted : (most > 0 ? most : 1);
}

const char* launch_lowrank_param_grad(ParamGradParams params, void* stream) {
  const char* error = dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Shape = ParamGradShape<T>;
    fill_tiles(params, kColumns);
    for (int j = 0; j < params.jobs; ++j) {
      if (params.dropout.rng != nullptr && (params.job[j].mask_big || params.job[j].mask_small))
        params.job[j].scale *= params.dropout.scale;
    }
    params.rows_per_split = ceil_div(ceil_div(params.rows, params.splits), Shape::kD) * Shape::kD;
    const dim3 grid(static_cast<unsigned>(params.first_tile[params.jobs]),
                    static_cast<unsigned>(ceil_div(params.rank, Shape::kBN)),
                    static_cast<unsigned>(params.splits));
    return launch(&lowrank_param_grad_kernel<T>, grid, Shape::kShared, stream, params);
  });
  if (error != nullptr) return error;
  fill_tiles(params, kReduceTile);
  const dim3 grid(static_cast<unsigned>(params.first_tile[params.jobs]),
                  static_cast<unsigned>(ceil_div(params.rank, kReduceTile)));
  return launch(&lowrank_param_reduce_kernel, grid, kReduceBytes, stream, params);
}

}  // namespace petal
