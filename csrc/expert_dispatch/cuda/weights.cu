// expert_dispatch, the reductions over tokens. Legend as in forward.cu; backward.cu leaves
// ga = g act(z), dz, the gates and dl. Inner: the columns of ga and dz, E r, or r of slots.
//
//   dup_e = mix dout^T ga_e, ddown_e^T = x^T dz_e;  dup_bias_e = mix sum g_e dout,
//   drouter = dl^T x, ddown_bias_e = sum dz_e (sorted)
//
// Shapes   as there; targets of the reduce at any strides, in T or fp32.
// Grid     weights: (64 columns of O or D, 64 of the bottlenecks, splits of the tokens), stationary
//          over all tokens and E r columns, sorted over one expert's slots, whose rows of dout and
//          x are gathered. sums: (256 columns, four experts or the slots of one, splits). reduce:
//          (32 x 32 tiles of all targets).
// Traffic  dout and x from DRAM once (sorted: k times, gathered), from L2 by the tiles that run
//          side by side; ga, dz, gates and dl; fp32 partials [splits, E, O r + D r + sums].
// Numerics fp32 accumulators and partials; the reduce adds splits in ascending order and rounds
//          once. The number of splits depends on shapes alone, an expert's slots are dealt evenly.
// Limits   r <= 256. Same bits on every run.
// Source   ops/expert_dispatch/reference.py.
#include "block.cuh"

namespace petal {
namespace {

template <typename T>
struct ExpertWeightsShape {
  static constexpr int kWide = 64, kRows = 32, kTile = kTileElements<T, kRows, kWide>;
  using Product = TileProduct<T, kWide, kWide, kRows, false, false, 2, 2, 1>;
  using Result = Stage<kWide, kWide>;
  using Tiles = Ring<T, kTile, kTile>;
  static constexpr size_t kResultBytes = sizeof(float) * Result::kFloats;
  static constexpr size_t kBytes = Tiles::kBytes > kResultBytes ? Tiles::kBytes : kResultBytes;
};

// The part of [first, end) that split `split` of `splits` takes, in multiples of `step`.
__device__ __forceinline__ void take_share(int64_t& first, int64_t& end, int64_t split,
                                           int64_t splits, int64_t step) {
  const int64_t share = ((end - first + splits - 1) / splits + step - 1) / step * step;
  first += split * share;
  if (end > first + share) end = first + share;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    expert_dispatch_bwd_weights_kernel(const __grid_constant__ ExpertWeightsParams p) {
  using Shape = ExpertWeightsShape<T>;
  using Result = typename Shape::Result;
  constexpr int kWide = Shape::kWide, kRows = Shape::kRows;
  PETAL_SHARED(shared);
  const int j = static_cast<int64_t>(blockIdx.x) >= p.first_tile[0] ? 1 : 0;
  const ExpertProduct& job = p.product[j];
  const int64_t col0 = (blockIdx.x - (j == 1 ? p.first_tile[0] : 0)) * kWide;
  const bool sorted = p.offsets != nullptr;
  const int tiles = sorted ? (p.rank + kWide - 1) / kWide : gridDim.y;
  const int expert = blockIdx.y / tiles, c0 = blockIdx.y % tiles * kWide,
            inner = sorted ? p.rank : p.experts * p.rank;
  int64_t first = sorted ? p.offsets[expert] : 0, end = sorted ? p.offsets[expert + 1] : p.rows;
  take_share(first, end, blockIdx.z, p.splits, kRows);

  const typename Shape::Tiles ring{reinterpret_cast<T*>(shared)};
  float* const stage = reinterpret_cast<float*>(shared);
  typename Shape::Product product;
  product.clear();
  run_pipeline(
      end > first ? (end - first + kRows - 1) / kRows : 0,
      [&](int64_t t) {
        const int64_t row0 = first + t * kRows;
        gather_tile<T, kRows, kWide>(
            ring.a(t), job.in,
            [&](int r) {
              if (row0 + r >= end) return int64_t{-1};
              return sorted ? static_cast<int64_t>(p.order[row0 + r]) : row0 + r;
            },
            col0, job.width);
        load_tile<T, kRows, kWide>(ring.b(t), at<T>(job.side, 0, 0), job.side.stride, job.side.vec,
                                   row0, end, c0, inner);
      },
      [](int64_t) { return false; }, [&](int64_t t) { product.step(ring.a(t), ring.b(t)); });
  __syncthreads();  // the stage lies over the ring
  product.store(stage);
  __syncthreads();
  const auto address = [&](int e, int64_t col, int own) {
    return job.partial + ((blockIdx.z * p.experts + e) * job.width + col) * p.rank + own;
  };
#pragma unroll 1
  for (int i = 0; i < Result::kPerThread; ++i) {
    const int64_t col = col0 + Result::row(i);
    const int c = c0 + Result::col(i), valid = col < job.width ? valid_columns(c, inner, 8) : 0;
    if (valid == 0) continue;
    float v[8];
    Result::template read<1>(v, stage, i);
    int e = sorted ? expert : c / p.rank, own = sorted ? c : c - e * p.rank;
    if (sorted || p.rank % 8 == 0) {
      store8<float>(address(e, col, own), v, valid, p.rank % 4 == 0);
      continue;
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (k < valid) *address(e, col, own) = v[k];
      if (++own == p.rank) own = 0, ++e;
    }
  }
}

constexpr int kSumColumns = kWarp * 8, kSumExperts = 4, kWarps = kThreads / kWarp;
constexpr size_t kSumBytes = sizeof(float) * kWarps * kSumExperts * kSumColumns;

__global__ void __launch_bounds__(kThreads)
    expert_dispatch_bwd_sums_kernel(const __grid_constant__ ExpertSumsParams p) {
  PETAL_SHARED(shared);
  float* const sums = reinterpret_cast<float*>(shared);
  int j = 0;
  while (static_cast<int64_t>(blockIdx.x) >= p.first_tile[j + 1]) ++j;
  const ExpertSum& job = p.job[j];
  const bool by_slot = job.factor == nullptr;
  const int each = by_slot ? 1 : kSumExperts, e0 = static_cast<int>(blockIdx.y) * each;
  if (e0 >= p.experts) return;
  int64_t first = by_slot ? p.offsets[e0] : 0, end = by_slot ? p.offsets[e0 + 1] : p.rows;
  take_share(first, end, blockIdx.z, p.splits, 1);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t col0 = (static_cast<int64_t>(blockIdx.x) - p.first_tile[j]) * kSumColumns;
  const int valid = valid_columns(col0 + lane * 8, job.width, 8);
  float sum[kSumExperts][8] = {};
#pragma unroll 2
  for (int64_t row = first + warp; row < end; row += kWarps) {
    float v[8];
    load8_as(v, job.in.data, job.dtype, row * job.in.stride + col0 + lane * 8, valid, job.in.vec);
#pragma unroll
    for (int e = 0; e < kSumExperts; ++e) {
      if (e0 + e >= p.experts || e >= each) continue;
      const float factor = by_slot ? 1.0f : job.factor[row * p.experts + e0 + e];
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[e][i] += factor * v[i];
    }
  }
#pragma unroll
  for (int e = 0; e < kSumExperts; ++e)
    store8<float>(sums + (warp * kSumExperts + e) * kSumColumns + lane * 8, sum[e], 8, true);
  __syncthreads();
  for (int i = threadIdx.x; i < each * kSumColumns; i += kThreads) {
    const int e = i / kSumColumns, c = i % kSumColumns;
    if (e0 + e >= p.experts || col0 + c >= job.width) continue;
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += sums[(w * kSumExperts + e) * kSumColumns + c];
    job.partial[(blockIdx.z * p.experts + e0 + e) * job.width + col0 + c] = total;
  }
}

__global__ void __launch_bounds__(kThreads)
    expert_dispatch_bwd_reduce_kernel(const __grid_constant__ ExpertReduceParams p) {
  int j = 0;
  while (static_cast<int64_t>(blockIdx.x) >= p.first_tile[j + 1]) ++j;
  const ExpertReduce& job = p.job[j];
  const int64_t across = (job.cols + kReduceTile - 1) / kReduceTile,
                tiles = (job.rows + kReduceTile - 1) / kReduceTile * across,
                tile = static_cast<int64_t>(blockIdx.x) - p.first_tile[j], e = tile / tiles;
  const size_t size = job.dtype == DType::kFloat32 ? 4 : 2;
  const ReduceTarget target{static_cast<char*>(job.out) + e * job.stride_expert * size, job.dtype,
                            job.stride_row, job.stride_col, job.scale};
  reduce_tile(job.partial + e * job.expert_stride, job.split_stride, job.splits, job.rows, job.cols,
              tile % tiles / across * kReduceTile, tile % across * kReduceTile, target);
}

}  // namespace

const char* launch_expert_dispatch_bwd_weights(ExpertWeightsParams params, void* stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Shape = ExpertWeightsShape<T>;
    params.first_tile[0] = ceil_div(params.product[0].width, Shape::kWide);
    params.first_tile[1] = params.first_tile[0] + ceil_div(params.product[1].width, Shape::kWide);
    const int64_t tiles = params.offsets != nullptr
                              ? params.experts * ceil_div(params.rank, Shape::kWide)
                              : ceil_div(params.experts * params.rank, Shape::kWide);
    const dim3 grid(static_cast<unsigned>(params.first_tile[1]), static_cast<unsigned>(tiles),
                    static_cast<unsigned>(params.splits));
    return launch(&expert_dispatch_bwd_weights_kernel<T>, grid, Shape::kBytes, stream, params);
  });
}

size_t expert_dispatch_bwd_weights_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? ExpertWeightsShape<float>::kBytes
                                  : ExpertWeightsShape<__half>::kBytes;
}

const char* launch_expert_dispatch_bwd_sums(ExpertSumsParams params, void* stream) {
  int64_t groups = 0;
  params.first_tile[0] = 0;
  for (int j = 0; j < params.jobs; ++j) {
    params.first_tile[j + 1] = params.first_tile[j] + ceil_div(params.job[j].width, kSumColumns);
    const int64_t mine =
        params.job[j].factor == nullptr ? params.experts : ceil_div(params.experts, kSumExperts);
    groups = mine > groups ? mine : groups;
  }
  const dim3 grid(static_cast<unsigned>(params.first_tile[params.jobs]),
                  static_cast<unsigned>(groups), static_cast<unsigned>(params.splits));
  return launch(&expert_dispatch_bwd_sums_kernel, grid, kSumBytes, stream, params);
}

const char* launch_expert_dispatch_bwd_reduce(ExpertReduceParams params, void* stream) {
  params.first_tile[0] = 0;
  for (int j = 0; j < params.jobs; ++j) {
    const ExpertReduce& job = params.job[j];
    params.first_tile[j + 1] = params.first_tile[j] + job.experts *
                                                          ceil_div(job.rows, kReduceTile) *
                                                          ceil_div(job.cols, kReduceTile);
  }
  const dim3 grid(static_cast<unsigned>(params.first_tile[params.jobs]));
  return launch(&expert_dispatch_bwd_reduce_kernel, grid, kReduceBytes, stream, params);
}

}  // namespace petal
