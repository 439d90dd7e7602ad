// mode_contract, backward from D = dPT [K, R, O]. Legend: K modes, R rank, O rows of V; T = fp32,
// fp16, bf16.
//
//   Tucker   dM_k[a, b] = s sum_o D[k, a, o] V[o, b];     dC[a, b, c] = sum_k dM_k[a, b] p_k[c];
//            dp_k[c] = sum_{a, b} dM_k[a, b] C[a, b, c];
//            dV[o, b] = s sum_{k, a} D[k, a, o] M_k[a, b], M_k computed again
//   CP       q[k, a] = s sum_o D[k, a, o] V[o, a];        dlambda[a] = sum_k q[k, a] p_k[a];
//            dp_k[a] = q[k, a] lambda[a];  dV[o, a] = s sum_k D[k, a, o] lambda[a] p_k[a]
//
// Shapes   everything contiguous in T; gradients in T.
// Grid     core kernel: a block per slab a: dM[:, a, :] in shared memory, from it dC[a] (written
//          once) and its share of dp. up kernel: (tiles of dV, groups of slabs): M[:, a, tile] in
//          shared memory for one slab after the other, dV in registers. CP: a block per a.
// Traffic  core kernel: D and C once, dC once, fp32 partials of dp [R, K, R]. up kernel: D once per
//          64 columns of R, C once per column tile of O (L2), partials of dV [groups, O, R]. All
//          partials are written and read once.
// Numerics fp32 accumulators and partials, added in ascending order (no atomics: same bits on every
//          run of a device); dM and M enter the 16-bit products as hi + lo (common/cuda/parts.cuh); one
//          rounding per gradient element.
// Limits   as forward.
// Source   ops/mode_contract/reference.py: P_k = s V M_k^T, differentiated.
#include "common/cuda/launchers.cuh"
#include "common/cuda/partials.cuh"
#include "common/cuda/parts.cuh"
#include "common/cuda/pipeline.cuh"
#include "params.h"

namespace petal {
namespace {

template <typename T>
struct CoreShape {
  static constexpr int kB = kModeTile, kD = kDepth<T>;
  using Hidden = TileProduct<T, kB, kB, kD, true, false, 2, 2, 1>;             // D[:, a, :] V
  using Core = TileProduct<T, kB, kB, kD, false, false, 2, 2, 1, kPartLd<T>>;  // dM^T modes
  using Modes = TileProduct<T, kB, kB, kD, true, false, 2, 2, 1, kPartLd<T>>;  // dM C[a]
  using Tiles = Ring<T, kTileElements<T, kB, kD>, kTileElements<T, kD, kB>>;
  static constexpr size_t kStageBytes = sizeof(float) * Stage<kB, kB>::kFloats;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    mode_contract_bwd_core_kernel(const __grid_constant__ ModeParams p) {
  using Shape = CoreShape<T>;
  using Out = Stage<kModeTile, kModeTile>;
  constexpr int kB = kModeTile, kD = Shape::kD, kBlock = kParts<T> * kPartElements<T>;
  PETAL_SHARED(shared);
  const typename Shape::Tiles ring{reinterpret_cast<T*>(shared)};
  float* const stage = reinterpret_cast<float*>(shared + Shape::Tiles::kBytes);
  T* const blocks = reinterpret_cast<T*>(shared + Shape::Tiles::kBytes + Shape::kStageBytes);
  const int64_t slab = blockIdx.x, rank = p.rank;
  const int mode_tiles = static_cast<int>((p.modes_count + kB - 1) / kB),
            rank_tiles = static_cast<int>((rank + kB - 1) / kB);
  const T* const dout = static_cast<const T*>(p.dout.data) + slab * p.dout.stride;

  for (int tile = 0; tile < mode_tiles * rank_tiles; ++tile) {
    const int64_t mode0 = tile / rank_tiles * kB, b0 = tile % rank_tiles * kB;
    typename Shape::Hidden product;
    product.clear();
    run_pipeline((p.columns + kD - 1) / kD,
                 [&](int64_t c) {
                   load_tile<T, kB, kD>(ring.a(c), dout, rank * p.dout.stride, p.dout.vec, mode0,
                                        p.modes_count, c * kD, p.columns);
                   load_tile<T, kD, kB>(ring.b(c), static_cast<const T*>(p.up.data), p.up.stride,
                                        p.up.vec, c * kD, p.columns, b0, rank);
                 },
                 [](int64_t) { return false; },
                 [&](int64_t c) { product.step(ring.a(c), ring.b(c)); });
    product.store(stage);
    __syncthreads();
    store_parts<T>(blocks + tile * kBlock, stage);
  }

  if (p.dcore != nullptr) {
    // dC[a][b, c]: the contraction runs over the modes, along the rows of both dM and modes.
    const int steps = mode_tiles * (kB / kD);
    T* const dcore = static_cast<T*>(p.dcore) + slab * rank * rank;
    for (int tile = 0; tile < rank_tiles * rank_tiles; ++tile) {
      const int b_tile = tile / rank_tiles;
      const int64_t c0 = tile % rank_tiles * kB;
      __syncthreads();  // the blocks are there, and nobody reads the last stage any more
      typename Shape::Core product;
      product.clear();
      run_pipeline(
          steps,
          [&](int64_t i) {
            load_tile<T, kD, kB>(ring.b(i), static_cast<const T*>(p.modes.data), p.modes.stride,
                                 p.modes.vec, i * kD, p.modes_count, c0, rank);
          },
          [](int64_t) { return false; },
          [&](int64_t i) {
            const int mode = static_cast<int>(i) * kD;
            const T* const block =
                blocks + (mode / kB * rank_tiles + b_tile) * kBlock + mode % kB * kPartLd<T>;
#pragma unroll
            for (int part = 0; part < kParts<T>; ++part)
              product.step(block + part * kPartElements<T>, ring.b(i));
          });
      product.store(stage);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Out::kPerThread; ++i) {
        const int64_t b = static_cast<int64_t>(b_tile) * kB + Out::row(i), c = c0 + Out::col(i);
        const int valid = b < rank ? valid_columns(c, rank, 8) : 0;
        float v[8];
        Out::template read<1>(v, stage, i);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] *= p.scale;
        if (valid > 0) store8<T>(dcore + b * rank + c, v, valid, p.dcore_vec);
      }
    }
  }

  if (p.dmodes != nullptr) {
    const int steps = rank_tiles * (kB / kD);
    const T* const core = static_cast<const T*>(p.core.data) + slab * rank * p.core.stride;
    float* const partial = p.modes_partial + slab * p.modes_count * rank;
    for (int tile = 0; tile < mode_tiles * rank_tiles; ++tile) {
      const int mode_tile = tile / rank_tiles;
      const int64_t c0 = tile % rank_tiles * kB;
      __syncthreads();
      typename Shape::Modes product;
      product.clear();
      run_pipeline(
          steps,
          [&](int64_t i) {
            load_tile<T, kD, kB>(ring.b(i), core, p.core.stride, p.core.vec, i * kD, rank, c0,
                                 rank);
          },
          [](int64_t) { return false; },
          [&](int64_t i) {
            const int b = static_cast<int>(i) * kD;
            const T* const block = blocks + (mode_tile * rank_tiles + b / kB) * kBlock + b % kB;
#pragma unroll
            for (int part = 0; part < kParts<T>; ++part)
              product.step(block + part * kPartElements<T>, ring.b(i));
          });
      product.store(stage);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Out::kPerThread; ++i) {
        const int64_t mode = static_cast<int64_t>(mode_tile) * kB + Out::row(i),
                      c = c0 + Out::col(i);
        const int valid = mode < p.modes_count ? valid_columns(c, rank, 8) : 0;
        float v[8];
        Out::template read<1>(v, stage, i);
        if (valid > 0) store8<float>(partial + mode * rank + c, v, valid, rank % 4 == 0);
      }
    }
  }
}

template <typename T>
struct UpShape {
  static constexpr int kB = kModeTile, kO = sizeof(T) == 2 ? 128 : 64, kD = kDepth<T>;
  using Contract = TileProduct<T, kB, kB, kD, true, true, 2, 2, 1>;  // modes C[a]^T
  using Up =
      TileProduct<T, kO, kB, kD, false, false, 2, 2, 1, kLd<T, kO>, kPartLd<T>>;  // D[:, a, :]^T M
  static constexpr int kA = kTileElements<T, kB, kD>, kOut = kTileElements<T, kD, kO>;
  using Tiles = Ring<T, (kA > kOut ? kA : kOut), kTileElements<T, kB, kD>>;
  static constexpr size_t kStageBytes = sizeof(float) * Stage<kO, kB>::kFloats;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    mode_contract_bwd_up_kernel(const __grid_constant__ ModeParams p) {
  using Shape = UpShape<T>;
  using Out = Stage<Shape::kO, Shape::kB>;
  constexpr int kB = Shape::kB, kO = Shape::kO, kD = Shape::kD;
  PETAL_SHARED(shared);
  const typename Shape::Tiles ring{reinterpret_cast<T*>(shared)};
  float* const stage = reinterpret_cast<float*>(shared + Shape::Tiles::kBytes);
  T* const block = reinterpret_cast<T*>(shared + Shape::Tiles::kBytes + Shape::kStageBytes);
  const int64_t rank = p.rank, slabs = (rank + p.up_splits - 1) / p.up_splits;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * kO,
                b0 = static_cast<int64_t>(blockIdx.y) * kB;
  const int64_t first = blockIdx.z * slabs, last = first + slabs < rank ? first + slabs : rank;
  const int chunks = static_cast<int>((rank + kD - 1) / kD);
  const T* const modes = static_cast<const T*>(p.modes.data);

  typename Shape::Up up;
  up.clear();
  for (int64_t slab = first; slab < last; ++slab) {
    const T* const core = static_cast<const T*>(p.core.data) + slab * rank * p.core.stride;
    const T* const dout = static_cast<const T*>(p.dout.data) + slab * p.dout.stride;
    for (int64_t mode0 = 0; mode0 < p.modes_count; mode0 += kB) {
      typename Shape::Contract contract;
      contract.clear();
      __syncthreads();  // nobody reads the last stage or the block any more
      run_pipeline(
          chunks,
          [&](int64_t c) {
            load_tile<T, kB, kD>(ring.a(c), modes, p.modes.stride, p.modes.vec, mode0,
                                 p.modes_count, c * kD, rank);
            load_tile<T, kB, kD>(ring.b(c), core, p.core.stride, p.core.vec, b0, rank, c * kD,
                                 rank);
          },
          [](int64_t) { return false; }, [&](int64_t c) { contract.step(ring.a(c), ring.b(c)); });
      contract.store(stage);
      __syncthreads();
      store_parts<T>(block, stage);
      run_pipeline(
          kB / kD,
          [&](int64_t i) {
            load_tile<T, kD, kO>(ring.a(i), dout, rank * p.dout.stride, p.dout.vec, mode0 + i * kD,
                                 p.modes_count, col0, p.columns);
          },
          [](int64_t) { return false; },
          [&](int64_t i) {
#pragma unroll
            for (int part = 0; part < kParts<T>; ++part)
              up.step(ring.a(i), block + part * kPartElements<T> + i * kD * kPartLd<T>);
          });
    }
  }
  __syncthreads();
  up.store(stage);
  __syncthreads();
  float* const partial = p.up_partial + blockIdx.z * p.columns * rank;
#pragma unroll
  for (int i = 0; i < Out::kPerThread; ++i) {
    const int64_t col = col0 + Out::row(i), b = b0 + Out::col(i);
    const int valid = col < p.columns ? valid_columns(b, rank, 8) : 0;
    float v[8];
    Out::template read<1>(v, stage, i);
    if (valid > 0) store8<float>(partial + col * rank + b, v, valid, rank % 4 == 0);
  }
}

// A block owns one a. Shared memory: q[K] and lambda[a] p_k[a] [K].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mode_diagonal_bwd_kernel(const __grid_constant__ ModeParams p) {
  PETAL_SHARED(shared);
  float* const q = reinterpret_cast<float*>(shared);
  float* const diagonal = q + p.modes_count;
  const int64_t a = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const T* const dout = static_cast<const T*>(p.dout.data) + a * p.dout.stride;
  const T* const up = static_cast<const T*>(p.up.data);
  const T* const modes = static_cast<const T*>(p.modes.data) + a;
  const int64_t mode_stride = p.rank * p.dout.stride;
  const float lambda = to_float(static_cast<const T*>(p.core.data)[a]);
  for (int64_t mode = warp; mode < p.modes_count; mode += kThreads / kWarp) {
    float sum = 0.0f;
    if (up != nullptr) {
      for (int64_t o = lane; o < p.columns; o += kWarp)
        sum = fmaf(to_float(dout[mode * mode_stride + o]), to_float(up[o * p.up.stride + a]), sum);
      sum = warp_sum(sum);
    } else {
      sum = to_float(dout[mode * mode_stride + a]);
    }
    const float value = p.scale * sum, factor = to_float(modes[mode * p.modes.stride]);
    if (lane == 0) {
      q[mode] = value * factor;
      diagonal[mode] = p.scale * lambda * factor;
      if (p.dmodes != nullptr)
        static_cast<T*>(p.dmodes)[mode * p.rank + a] = from_float<T>(value * lambda);
    }
  }
  __syncthreads();
  if (p.dcore != nullptr && threadIdx.x == 0) {
    float sum = 0.0f;
    for (int64_t mode = 0; mode < p.modes_count; ++mode) sum += q[mode];
    static_cast<T*>(p.dcore)[a] = from_float<T>(sum);
  }
  if (p.dup == nullptr) return;
  for (int64_t o = threadIdx.x; o < p.columns; o += kThreads) {
    float sum = 0.0f;
    for (int64_t mode = 0; mode < p.modes_count; ++mode)
      sum = fmaf(diagonal[mode], to_float(dout[mode * mode_stride + o]), sum);
    static_cast<T*>(p.dup)[o * p.rank + a] = from_float<T>(sum);
  }
}

}  // namespace

int64_t mode_up_splits(int64_t rank, int64_t columns, DType dtype) {
  const int64_t tiles =
      ceil_div(columns, dtype == DType::kFloat32 ? UpShape<float>::kO : UpShape<__half>::kO) *
      ceil_div(rank, kModeTile);
  const int64_t wanted = ceil_div(multiprocessors(), tiles > 0 ? tiles : 1);
  return wanted < rank ? wanted : rank;
}

const char* launch_mode_contract_bwd(const ModeParams& params, void* stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t rank_tiles = ceil_div(params.rank, kModeTile),
                  mode_tiles = ceil_div(params.modes_count, kModeTile);
    if (rank_tiles * mode_tiles > kMaxModeTiles)
      return "ceil(modes / 64) * ceil(rank / 64) is above 4";
    // [splits, rows, R] -> [rows, R].
    const auto reduce = [&](const float* partial, int64_t splits, int64_t rows, void* out) {
      const ReduceTarget target{out, params.dtype, params.rank, 1, params.scale};
      return reduce_partials({partial, splits, rows, params.rank, target}, stream);
    };
    const char* error = nullptr;
    if (params.dcore != nullptr || params.dmodes != nullptr) {
      using Shape = CoreShape<T>;
      const size_t bytes =
          Shape::Tiles::kBytes + Shape::kStageBytes + rank_tiles * mode_tiles * kBlockBytes<T>;
      error = launch(&mode_contract_bwd_core_kernel<T>, dim3(static_cast<unsigned>(params.rank)),
                     bytes, stream, params);
      if (error == nullptr && params.dmodes != nullptr) {
        error = reduce(params.modes_partial, params.rank, params.modes_count, params.dmodes);
      }
    }
    if (error == nullptr && params.dup != nullptr) {
      using Shape = UpShape<T>;
      const dim3 grid(static_cast<unsigned>(ceil_div(params.columns, Shape::kO)),
                      static_cast<unsigned>(rank_tiles), static_cast<unsigned>(params.up_splits));
      error = launch(&mode_contract_bwd_up_kernel<T>, grid,
                     Shape::Tiles::kBytes + Shape::kStageBytes + kBlockBytes<T>, stream, params);
      if (error == nullptr)
        error = reduce(params.up_partial, params.up_splits, params.columns, params.dup);
    }
    return error;
  });
}

const char* launch_mode_diagonal_bwd(const ModeParams& params, void* stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(&mode_diagonal_bwd_kernel<T>, dim3(static_cast<unsigned>(params.rank)),
                  2 * sizeof(float) * params.modes_count, stream, params);
  });
}

}  // namespace petal
