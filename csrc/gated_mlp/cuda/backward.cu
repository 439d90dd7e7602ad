// gated_mlp, what lies between the linears, backward. Legend: N rows, F columns, R rank of the last
// linear's update; A [R, F] its down-projection, of which h = (mask * p) A^T; mask that of dropout,
// with its factor; T = fp32, fp16, bf16.
//
//   du = act(g) * dp,  dg = act'(g) * u * dp,  dA = dh^T (mask * p),  p = act(g) * u formed again
//   (without u, the plain MLP: p = act(g), dg = act'(g) * dp)
//
// Shapes   g, u and their gradients [N, F], dh [N, R] in T, unit column stride, any row stride; dA
//          (`ddown`) [R, F] contiguous, in T or fp32.
// Grid     Where dA is not wanted, rows: a block per 16 x 128 tile. Where it is, down: (64 columns,
//          64 ranks (fp32 32), splits of the rows), 32 rows at a time (fp32 16) through the ring;
//          the tile of g becomes p in place, and is multiplied. The blocks of the first ranks
//          write dg and du. Then reduce: 32 x 32 tiles of dA.
// Traffic  5 N F: g, u and dp read, dg and du written, each once; g and u again for each further 64
//          ranks, dh once per 64 columns from L2, fp32 partials [splits, F, R] written and read.
//          dg overwrites dp.
// Numerics fp32; dg and du rounded once, p to T as an operand. Products on tensor cores, in fp32
//          IEEE FMAs; dropped elements are exact zeros, the factor of the kept ones is in the sum.
//          Splits are added in order: the same bits every time.
// Limits   any N, F and R.
// Source   ops/gated_mlp/reference.py: arXiv 2002.05202, 2106.09685.
#include "block.cuh"
#include "common/cuda/launchers.cuh"
#include "common/cuda/partials.cuh"
#include "common/cuda/pipeline.cuh"

namespace petal {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gated_mlp_act_bwd_rows_kernel(const __grid_constant__ MlpParams p) {
  const Corner at = corner(p);
  float g[Groups::kPerThread][8], u[Groups::kPerThread][8], d[Groups::kPerThread][8];
#pragma unroll
  for (int i = 0; i < Groups::kPerThread; ++i) {
    const int64_t row = at.row + Groups::row(i), col = at.col + Groups::col(i);
    const int valid = valid_at(p, row, col);
    read8<T>(g[i], p.g, row, col, valid);
    read8<T>(d[i], p.dp, row, col, valid);
    if (p.u.data != nullptr) {
      read8<T>(u[i], p.u, row, col, valid);
    } else {
      ones(u[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < Groups::kPerThread; ++i) {
    const int64_t row = at.row + Groups::row(i), col = at.col + Groups::col(i);
    const int valid = valid_at(p, row, col);
    differentiate(p.activation, g[i], u[i], d[i]);
    write8<T>(p.dp, row, col, d[i], valid);
    if (p.u.data != nullptr) write8<T>(p.du, row, col, u[i], valid);
  }
}

template <typename T>
struct DownShape {
  // kD rows of one stage: half the usual depth, since a stage holds three tiles of them.
  static constexpr int kF = 64, kR = sizeof(T) == 2 ? 64 : 32, kD = kDepth<T> / 2;
  using Product = TileProduct<T, kF, kR, kD, false, false, 2, 2, 1>;  // p^T dh
  static constexpr int kTile = kTileElements<T, kD, kF>;
  using Tiles = Ring<T, 3 * kTile, kTileElements<T, kD, kR>>;  // A: g, u, dp; B: dh
  static constexpr size_t kStageBytes = sizeof(float) * Stage<kF, kR>::kFloats;
  static constexpr size_t kShared = Tiles::kBytes > kStageBytes ? Tiles::kBytes : kStageBytes;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    gated_mlp_act_bwd_down_kernel(const __grid_constant__ MlpParams p) {
  using Shape = DownShape<T>;
  using In = Stage<Shape::kD, Shape::kF>;
  using Out = Stage<Shape::kF, Shape::kR>;
  constexpr int kF = Shape::kF, kR = Shape::kR, kD = Shape::kD, kTile = Shape::kTile;
  PETAL_SHARED(shared);
  const typename Shape::Tiles ring{reinterpret_cast<T*>(shared)};
  float* const stage = reinterpret_cast<float*>(shared);
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * kF,
                rank0 = static_cast<int64_t>(blockIdx.y) * kR;
  const int64_t row0 = blockIdx.z * p.rows_per_split;
  const int64_t end = row0 + p.rows_per_split < p.rows ? row0 + p.rows_per_split : p.rows;
  const bool gated = p.u.data != nullptr, writes = p.dp.data != nullptr && blockIdx.y == 0;
  const MaskSource mask = mask_source(p.dropout);

  typename Shape::Product product;
  product.clear();
  run_pipeline(
      end > row0 ? (end - row0 + kD - 1) / kD : 0,
      [&](int64_t tile) {
        const int64_t row = row0 + tile * kD;
        const auto load = [&](T* to, const MatrixView& m) {
          load_tile<T, kD, kF>(to, static_cast<const T*>(m.data), m.stride, m.vec, row, end, col0,
                               p.width);
        };
        load(ring.a(tile), p.g);
        if (gated) load(ring.a(tile) + kTile, p.u);
        if (writes) load(ring.a(tile) + 2 * kTile, p.dp);
        load_tile<T, kD, kR>(ring.b(tile), static_cast<const T*>(p.dh.data), p.dh.stride, p.dh.vec,
                             row, end, rank0, p.rank);
      },
      [&](int64_t tile) {
#pragma unroll
        for (int i = 0; i < In::kPerThread; ++i) {
          const int64_t row = row0 + tile * kD + In::row(i), col = col0 + In::col(i);
          T* const at = ring.a(tile) + In::row(i) * kLd<T, kF> + In::col(i);
          float g[8], u[8], d[8];
          load8<T>(g, at, 8, true);
          ones(u);
          ones(d);
          if (gated) load8<T>(u, at + kTile, 8, true);
          if (writes) load8<T>(d, at + 2 * kTile, 8, true);
          differentiate(p.activation, g, u, d);
          if (writes && row < end) {
            const int valid = valid_columns(col, p.width, 8);
            write8<T>(p.dp, row, col, d, valid);
            if (gated) write8<T>(p.du, row, col, u, valid);
          }
          if (mask.threshold > 0) {
            const uint32_t keep = mask.keep8(0, row, col);
#pragma unroll
            for (int j = 0; j < 8; ++j) g[j] = (keep >> j) & 1u ? g[j] : 0.0f;
          }
          store8<T>(at, g, 8, true);
        }
        return true;
      },
      [&](int64_t tile) { product.step(ring.a(tile), ring.b(tile)); });
  __syncthreads();  // the staged product takes the ring's memory
  product.store(stage);
  __syncthreads();
  float* const partial = p.partial + blockIdx.z * p.width * p.rank;
#pragma unroll
  for (int i = 0; i < Out::kPerThread; ++i) {
    const int64_t col = col0 + Out::row(i), rank = rank0 + Out::col(i);
    const int valid = col < p.width ? valid_columns(rank, p.rank, 8) : 0;
    float v[8];
    Out::template read<1>(v, stage, i);
    if (valid > 0) store8<float>(partial + col * p.rank + rank, v, valid, p.rank % 4 == 0);
  }
}

}  // namespace

const char* launch_gated_mlp_act_bwd(MlpParams params, void* stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Shape = DownShape<T>;
    if (params.dh.data == nullptr)
      return launch(&gated_mlp_act_bwd_rows_kernel<T>, tiles(params), 0, stream, params);
    params.rows_per_split = ceil_div(ceil_div(params.rows, params.splits), Shape::kD) * Shape::kD;
    const dim3 grid(static_cast<unsigned>(ceil_div(params.width, Shape::kF)),
                    static_cast<unsigned>(ceil_div(params.rank, Shape::kR)),
                    static_cast<unsigned>(params.splits));
    const char* const error =
        launch(&gated_mlp_act_bwd_down_kernel<T>, grid, Shape::kShared, stream, params);
    if (error != nullptr) return error;
    const float scale = params.dropout.rng != nullptr ? params.dropout.scale : 1.0f;
    return reduce_partials({params.partial,
                            params.splits,
                            params.width,
                            params.rank,
                            {params.ddown, params.ddown_dtype, 1, params.width, scale}},
                           stream);
  });
}

}  // namespace petal
