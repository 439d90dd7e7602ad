// lowrank_linear, the reductions over rows: kernels `param_grad` and `param_reduce`. Legend: N rows;
// of job j C_j columns of big_j (`width`), R_j columns of small_j (`rank`), s_j its scale; slots:
// block.cuh; T = fp32, fp16, bf16.
//
//   out_j[C_j, R_j] = s_j drop(big_j)^T drop(small_j)
//   dP_k: big = dy_k, small = m_k;   dU^T: big = x, small = dh;   dA_k^T: big = x, small = dh_k;
//   dcore_k^T: big = g_k, small = h
//
// Shapes   big_j [N, C_j] and small_j [N, R_j] row-major with any row stride; out_j at any two
//          strides, in T or fp32: both layouts of a parameter.
// Grid     param_grad: (64-column tiles of all groups, tiles of ranks, splits of the rows); a group
//          is one job or several that read one big: their ranks, each rounded up to a multiple of
//          16, side by side. reduce: (32 x 32 tiles of all outputs).
// Traffic  big from DRAM once for a group (read once per 64 columns of ranks, in fp32 per 32), and
//          staged once for all jobs in a tile, each with its mask's bits; small_j once per column
//          tile from L2, fp32 partials [splits, sum C_j R_j] written and read once (in L2).
// Numerics fp32 accumulators and partials; the second stage adds the splits in ascending order and
//          rounds once: no atomics, same bits on every run of a device. Masks are drawn again from
//          (seed, offset); dropped elements are exact zeros, the factor of the kept ones is in s_j.
// Limits   at most 8 jobs (4 outputs, a down-projection each), R_j <= 256.
// Source   ops/lowrank_linear/reference.py: dP_k = s_k dy_k^T m_k, dU = dh^T drop(x), dA_k.
#include "block.cuh"
#include "common/cuda/launchers.cuh"
#include "common/cuda/reduce.cuh"

namespace petal {
namespace {

constexpr int kColumns = 64;  // of big per block

template <typename T>
struct ParamGradShape {
  static constexpr int kBN = sizeof(T) == 2 ? 64 : 32, kD = kDepth<T>, kSlots = kBN / kSlot;
  using Product = KeptProduct<T, kColumns, kBN, kD, false, false, 2, 2, 1>;
  using Tiles = Ring<T, kTileElements<T, kD, kColumns>, kTileElements<T, kD, kBN>>;
  static constexpr size_t kStageBytes = sizeof(float) * Stage<kColumns, kBN>::kFloats;
  static constexpr size_t kShared = Tiles::kBytes > kStageBytes ? Tiles::kBytes : kStageBytes;
  static constexpr int kPlane = kPlaneBytes<kD, kColumns>;
};

// GROUPS: some job shares its big with its neighbour.
template <typename T, bool GROUPS>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    lowrank_param_grad_kernel(const __grid_constant__ ParamGradParams p) {
  using Shape = ParamGradShape<T>;
  using Out = Stage<kColumns, Shape::kBN>;
  constexpr int kBN = Shape::kBN, kD = Shape::kD;
  PETAL_SHARED(shared);
  const typename Shape::Tiles ring{reinterpret_cast<T*>(shared)};
  float* const stage = reinterpret_cast<float*>(shared);
  unsigned char* const bits = shared + Shape::kShared;
  int group = 0;
  while (static_cast<int64_t>(blockIdx.x) >= p.first_tile[group + 1]) ++group;
  const int first = GROUPS ? p.first_job[group] : group,
            end_job = GROUPS ? p.first_job[group + 1] : group + 1;
  const MatrixView big = p.job[first].big;
  const int64_t width = p.job[first].width;
  const bool mask_big = p.job[first].mask_big, mask_small = p.job[first].mask_small;
  const uint32_t stream = p.job[first].stream;
  const int64_t col0 = (static_cast<int64_t>(blockIdx.x) - p.first_tile[group]) * kColumns,
                rank0 = static_cast<int64_t>(blockIdx.y) * kBN;
  const Slots slots{p.first_slot, first, end_job, static_cast<int>(blockIdx.y) * Shape::kSlots};
  // The grid has the rank tiles of the group with most ranks; this group ends before.
  if (slots.col(0, end_job - 1) >= p.job[end_job - 1].rank) return;
  const uint32_t planes = GROUPS ? slots.template planes<Shape::kSlots>() : 0;
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
        if constexpr (GROUPS) {
#pragma unroll
          for (int s = 0; s < Shape::kSlots; ++s) {
            const int j = slots.item(s);
            const MatrixView small = p.job[j].small;
            load_tile<T, kD, kSlot, kLd<T, kBN>>(
                ring.b(tile) + s * kSlot, static_cast<const T*>(small.data), small.stride,
                small.vec, row, end, slots.col(s, j), p.job[j].rank);
          }
        } else {
          const MatrixView small = p.job[first].small;
          load_tile<T, kD, kBN>(ring.b(tile), static_cast<const T*>(small.data), small.stride,
                                small.vec, row, end, rank0, p.job[first].rank);
        }
      },
      [&](int64_t tile) {
        const int64_t row = row0 + tile * kD;
        if constexpr (GROUPS) {
          const int from = slots.item(0), to = slots.item(Shape::kSlots - 1);
          for (int j = from; mask_big && j <= to; ++j)
            keep_plane<kD, kColumns>(bits + (j - from) * Shape::kPlane, mask, p.job[j].stream, row,
                                     col0);
        } else {
          if (mask_big) mask_tile<T, kD, kColumns>(ring.a(tile), mask, stream, row, col0);
        }
        if (mask_small) mask_tile<T, kD, kBN>(ring.b(tile), mask, stream, row, rank0);
        return mask_big || mask_small;
      },
      [&](int64_t tile) {
        if (GROUPS && mask_big) {
          product.step_kept(ring.a(tile), ring.b(tile), bits, planes);
        } else {
          product.step(ring.a(tile), ring.b(tile));
        }
      });
  __syncthreads();  // the staged product takes the ring's memory
  product.store(stage);
  __syncthreads();
  float* const partial = p.partial + blockIdx.z * p.partial_stride;
#pragma unroll
  for (int i = 0; i < Out::kPerThread; ++i) {
    if (!Out::has(i)) continue;
    const int j = GROUPS ? slots.item(Out::col(i) / kSlot) : first;
    const int64_t col = col0 + Out::row(i),
                  rank = GROUPS ? slots.col(Out::col(i) / kSlot, j) + Out::col(i) % kSlot
                                : rank0 + Out::col(i);
    const int ranks = p.job[j].rank, valid = col < width ? valid_columns(rank, ranks, 8) : 0;
    float v[8];
    Out::template read<1>(v, stage, i);
    if (valid > 0)
      store8<float>(partial + p.first_element[j] + col * ranks + rank, v, valid, ranks % 4 == 0);
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
  if (rank0 >= p.job[j].rank) return;
  const ReduceTarget target{p.job[j].out, p.job[j].out_dtype, p.job[j].out_stride_width,
                            p.job[j].out_stride_rank, p.job[j].scale};
  reduce_tile(p.partial + p.first_element[j], p.partial_stride, p.splits, p.job[j].width,
              p.job[j].rank, col0, rank0, target);
}

// Whether a job reads what its predecessor read, by masks of the same operand at most.
bool joins(const ReduceJob& job, const ReduceJob& before) {
  return job.big.data == before.big.data && job.big.stride == before.big.stride &&
         job.width == before.width && job.mask_big == before.mask_big && !job.mask_small &&
         !before.mask_small;
}

// Columns of a group's smalls side by side: the last one needs no whole slot.
int64_t ranks_of(const ParamGradParams& p, int group) {
  const int last = p.first_job[group + 1] - 1;
  return last == p.first_job[group] ? p.job[last].rank
                                    : p.first_slot[last] * kSlot + p.job[last].rank;
}

// Where tiles of `tile` columns of big begin: of every group, or of every job.
void fill_tiles(ParamGradParams& p, int64_t tile, bool jobs) {
  p.first_tile[0] = 0;
  for (int i = 0; i < (jobs ? p.jobs : p.groups); ++i)
    p.first_tile[i + 1] = p.first_tile[i] + ceil_div(p.job[jobs ? i : p.first_job[i]].width, tile);
}

}  // namespace

void plan_param_grad(ParamGradParams& p) {
  p.groups = 0;
  p.partial_stride = 0;
  for (int j = 0; j < p.jobs; ++j) {
    const bool joined = j > 0 && joins(p.job[j], p.job[j - 1]);
    p.first_slot[j] =
        joined ? p.first_slot[j - 1] + static_cast<int32_t>(ceil_div(p.job[j - 1].rank, kSlot)) : 0;
    if (!joined) p.first_job[p.groups++] = j;
    p.first_element[j] = p.partial_stride;
    p.partial_stride += ceil_div(p.job[j].width * p.job[j].rank, 4) * 4;  // 16 bytes
  }
  p.first_job[p.groups] = p.jobs;
  if (p.splits > 0) return;
  int64_t tiles = 0;
  for (int g = 0; g < p.groups; ++g)
    tiles += ceil_div(p.job[p.first_job[g]].width, kColumns) * ceil_div(ranks_of(p, g), kColumns);
  const int64_t wanted = ceil_div(2 * multiprocessors(), tiles > 0 ? tiles : 1),
                most = ceil_div(p.rows, 256);
  p.splits = wanted < most ? wanted : (most > 0 ? most : 1);
}

const char* launch_lowrank_param_grad(ParamGradParams params, void* stream) {
  const char* error = dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Shape = ParamGradShape<T>;
    fill_tiles(params, kColumns, false);
    int64_t ranks = 0;
    for (int g = 0; g < params.groups; ++g)
      ranks = ranks > ranks_of(params, g) ? ranks : ranks_of(params, g);
    for (int j = 0; j < params.jobs; ++j) {
      if (params.dropout.rng != nullptr && (params.job[j].mask_big || params.job[j].mask_small))
        params.job[j].scale *= params.dropout.scale;
    }
    params.rows_per_split = ceil_div(ceil_div(params.rows, params.splits), Shape::kD) * Shape::kD;
    const dim3 grid(static_cast<unsigned>(params.first_tile[params.groups]),
                    static_cast<unsigned>(ceil_div(ranks, Shape::kBN)),
                    static_cast<unsigned>(params.splits));
    if (params.groups == params.jobs)
      return launch(&lowrank_param_grad_kernel<T, false>, grid, Shape::kShared, stream, params);
    return launch(&lowrank_param_grad_kernel<T, true>, grid,
                  Shape::kShared + Shape::kSlots * Shape::kPlane, stream, params);
  });
  if (error != nullptr) return error;
  fill_tiles(params, kReduceTile, true);
  int64_t rank = 0;
  for (int j = 0; j < params.jobs; ++j)
    rank = rank > params.job[j].rank ? rank : params.job[j].rank;
  const dim3 grid(static_cast<unsigned>(params.first_tile[params.jobs]),
                  static_cast<unsigned>(ceil_div(rank, kReduceTile)));
  return launch(&lowrank_param_reduce_kernel, grid, kReduceBytes, stream, params);
}

}  // namespace petal
