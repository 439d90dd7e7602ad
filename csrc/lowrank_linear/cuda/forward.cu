// lowrank_linear, out of the bottleneck. Legend: N rows, D input width, R rank, K outputs of widths
// O_k and ranks R_k; T = fp32, fp16, bf16.
//
//   expand   out_k[N, O_k] = base_k + s_k mask * (drop_k(a_k) b_k^T)
//            the update (a = h, b = ups) and dx (a = dh, b = down)
//   terms    out[N, D] = base + s sum_k mask_k * (a_k b_k^T): dx of own down-projections
//   update   h = drop(x) down^T, or every h_k = drop_k(x) down_k^T, and the expansion in one launch,
//            for few rows
//
// Shapes   a row-major with any row stride; b in either orientation (template B_KC: its contraction
//          index is the contiguous one); 16-byte copies where address and row stride allow
//          (MatrixView::vec), element copies otherwise; no size is a multiple of anything.
// Grid     expand: (row blocks, column tiles of all outputs): k is found from the tile, so outputs
//          may differ in width and rank and nothing is unrolled over k. update: (row blocks, column
//          groups, K).
// Traffic  expand: base and out once, also of a sum of terms; a and b from L2. update: as expand,
//          and x from L2 K x column groups times; no block waits for another one's h.
// Numerics fp32 accumulators and epilogue, one rounding per output element; h is rounded to T
//          before it is expanded (T is what is saved). Dropped operand elements become exact zeros,
//          the factor of the kept ones is applied to the fp32 result. fp32 products are IEEE FMAs.
// Limits   K <= 4, R_k <= 256 (update: R_k <= 64). Every sum has a fixed order: same bits on every
//          run.
// Source   ops/lowrank_linear/reference.py: y_k = x W_k^T + b_k + s_k drop_k(x U^T) P_k^T, dx.
#include "block.cuh"
#include "common/cuda/launchers.cuh"

namespace petal {
namespace {

// base + scale * mask * C for one staged tile of output k: shared by expand and update. MASKED: C
// has met its masks.
template <typename T, int BM, int BN, int COPIES, bool MASKED>
__device__ __forceinline__ void expand_epilogue(const ExpandParams& p, const MaskSource& mask,
                                                int k, const float* stage, int64_t row0,
                                                int64_t col0) {
  using Out = Stage<BM, BN>;
  const MatrixView base = p.base[k], out = p.out[k];
  const int64_t width = p.widths[k];
  const float scale = p.scales[k] * (p.mask_a || p.mask_out ? p.dropout.scale : 1.0f);
#pragma unroll
  for (int i = 0; i < Out::kPerThread; ++i) {
    const int64_t row = row0 + Out::row(i), col = col0 + Out::col(i);
    const int valid = Out::has(i) && row < p.rows ? valid_columns(col, width, 8) : 0;
    if (valid == 0) continue;
    float c[8], y[8] = {};
    Out::template read<COPIES>(c, stage, i);
    if (base.data != nullptr)
      load8<T>(y, static_cast<const T*>(base.data) + row * base.stride + col, valid, base.vec);
    const uint32_t keep = !MASKED && p.mask_out ? mask.keep8(0, row, col) : 0xFFu;
#pragma unroll
    for (int j = 0; j < 8; ++j) y[j] += (keep >> j) & 1u ? scale * c[j] : 0.0f;
    store8<T>(static_cast<T*>(out.data) + row * out.stride + col, y, valid, out.vec);
  }
}

template <typename T>
constexpr int kExpandColumns = sizeof(T) == 2 ? 128 : 64;

template <typename T, bool B_KC>
struct ExpandShape {
  static constexpr int kBM = 64, kBN = kExpandColumns<T>, kD = kDepth<T>;
  using Product = KeptProduct<T, kBM, kBN, kD, true, B_KC, 2, 2, 1>;
  static constexpr int kA = kTileElements<T, kBM, kD>,
                       kB = B_KC ? kTileElements<T, kBN, kD> : kTileElements<T, kD, kBN>;
  using Tiles = Ring<T, kA, kB>;
  static constexpr size_t kStageBytes = sizeof(float) * Stage<kBM, kBN>::kFloats;
  static constexpr size_t kShared = Tiles::kBytes > kStageBytes ? Tiles::kBytes : kStageBytes;
  static constexpr size_t kPlane = kPlaneBytes<kBM, kBN>;
};

template <typename T, bool B_KC, bool TERMS>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    lowrank_expand_kernel(const __grid_constant__ ExpandParams p) {
  using Shape = ExpandShape<T, B_KC>;
  constexpr int kBM = Shape::kBM, kBN = Shape::kBN, kD = Shape::kD;
  PETAL_SHARED(shared);
  const typename Shape::Tiles ring{reinterpret_cast<T*>(shared)};
  float* const stage = reinterpret_cast<float*>(shared);
  unsigned char* const plane = shared + Shape::kShared;  // of the term that is at its last tile
  int k = 0;
  while (static_cast<int64_t>(blockIdx.y) >= p.first_tile[k + 1]) ++k;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kBM;
  const int64_t col0 = (static_cast<int64_t>(blockIdx.y) - p.first_tile[k]) * kBN;
  const int64_t width = p.widths[k];
  const MaskSource mask = mask_source(p.dropout);
  const int last = TERMS ? p.terms : k + 1;
  int64_t tiles = 0;
  for (int t = k; t < last; ++t) tiles += (p.ranks[t] + kD - 1) / kD;
  Cursor ahead{k, 0}, here{k, 0};
  typename Shape::Product product, sum;
  product.clear();
  if (TERMS) sum.clear();
  run_pipeline(
      tiles,
      [&](int64_t tile) {
        const int t = TERMS ? ahead.k : k, rank = p.ranks[t];
        const MatrixView a = p.a[t], b = p.b[t];
        load_tile<T, kBM, kD>(ring.a(tile), static_cast<const T*>(a.data), a.stride, a.vec, row0,
                              p.rows, ahead.col, rank);
        if constexpr (B_KC) {
          load_tile<T, kBN, kD>(ring.b(tile), static_cast<const T*>(b.data), b.stride, b.vec, col0,
                                width, ahead.col, rank);
        } else {
          load_tile<T, kD, kBN>(ring.b(tile), static_cast<const T*>(b.data), b.stride, b.vec,
                                ahead.col, rank, col0, width);
        }
        ahead.advance(p.ranks, kD);
      },
      [&](int64_t tile) {
        if constexpr (TERMS) {
          if (!p.mask_out || here.col + kD < p.ranks[here.k]) return false;
          keep_plane<kBM, kBN>(plane, mask, here.k, row0, col0);
          return true;
        } else {
          if (p.mask_a) mask_tile<T, kBM, kD>(ring.a(tile), mask, k, row0, here.col);
          return p.mask_a;
        }
      },
      [&](int64_t tile) {
        product.step(ring.a(tile), ring.b(tile));
        if (!here.advance(p.ranks, kD) || !TERMS || !p.mask_out) return;
        sum.add_kept(product, plane);
        product.clear();
      });
  __syncthreads();  // the stage lies over the ring
  if (TERMS && p.mask_out) {
    sum.store(stage);
  } else {
    product.store(stage);
  }
  __syncthreads();
  expand_epilogue<T, kBM, kBN, 1, TERMS>(p, mask, k, stage, row0, col0);
}

// 16 rows; the whole bottleneck (BR >= R columns) stays in shared memory as the left operand of the
// expansion.
template <typename T, int BR, bool B_KC>
struct UpdateShape {
  static constexpr int kBM = 16, kBN = 64;
  using Down = ShrinkShape<T, kBM, BR, true>;
  using Up = TileProduct<T, kBM, kBN, BR, true, B_KC, 1, 4, 1>;
  static constexpr int kHidden = kTileElements<T, kBM, BR>,
                       kB = B_KC ? kTileElements<T, kBN, BR> : kTileElements<T, BR, kBN>;
  using Tiles = Ring<T, 0, kB>;
  static constexpr size_t kRingBytes =
      Down::Tiles::kBytes > Tiles::kBytes ? Down::Tiles::kBytes : Tiles::kBytes;
  static constexpr size_t kUpStageBytes = sizeof(float) * Stage<kBM, kBN>::kFloats;
  static constexpr size_t kStageBytes =
      Down::kStageBytes > kUpStageBytes ? Down::kStageBytes : kUpStageBytes;
  static constexpr size_t kShared = kRingBytes + kStageBytes + sizeof(T) * kHidden;
};

template <typename T, int BR, bool B_KC>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    lowrank_update_kernel(const __grid_constant__ UpdateParams p) {
  using Shape = UpdateShape<T, BR, B_KC>;
  using Down = typename Shape::Down;
  using Out = Stage<Shape::kBM, BR>;
  constexpr int kBM = Shape::kBM, kBN = Shape::kBN, kD = Down::kD;
  PETAL_SHARED(shared);
  const typename Down::Tiles down_ring{reinterpret_cast<T*>(shared)};
  const typename Shape::Tiles up_ring{reinterpret_cast<T*>(shared)};
  float* const stage = reinterpret_cast<float*>(shared + Shape::kRingBytes);
  T* const hidden = reinterpret_cast<T*>(shared + Shape::kRingBytes + Shape::kStageBytes);
  const ExpandParams& e = p.expand;
  const int k = blockIdx.z, rank = e.ranks[k];
  const uint32_t stream = p.own ? k : 0;  // of x
  const MatrixView down = p.downs[k], out = e.a[k];
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kBM;
  const MaskSource mask = mask_source(e.dropout);

  {
    typename Down::Product product;
    product.clear();
    run_pipeline((p.depth + kD - 1) / kD,
                 [&](int64_t tile) {
                   load_tile<T, kBM, kD>(down_ring.a(tile), static_cast<const T*>(p.x.data),
                                         p.x.stride, p.x.vec, row0, e.rows, tile * kD, p.depth);
                   load_tile<T, BR, kD>(down_ring.b(tile), static_cast<const T*>(down.data),
                                        down.stride, down.vec, 0, rank, tile * kD, p.depth);
                 },
                 [&](int64_t tile) {
                   if (p.mask_x)
                     mask_tile<T, kBM, kD>(down_ring.a(tile), mask, stream, row0, tile * kD);
                   return p.mask_x;
                 },
                 [&](int64_t tile) { product.step(down_ring.a(tile), down_ring.b(tile)); });
    product.store(stage);
  }
  __syncthreads();
  const bool writes_hidden = blockIdx.y == 0 && (p.own || k == 0);
  const float hidden_scale = p.mask_x ? e.dropout.scale : 1.0f;
#pragma unroll
  for (int i = 0; i < Out::kPerThread; ++i) {
    if (!Out::has(i)) continue;
    float v[8];
    Out::template read<Down::Product::kCopies>(v, stage, i);
    const int64_t row = row0 + Out::row(i);
    const int col = Out::col(i), valid = row < e.rows ? valid_columns(col, rank, 8) : 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= hidden_scale;
    if (writes_hidden && valid > 0) {
      store8<T>(static_cast<T*>(out.data) + row * out.stride + col, v, valid, out.vec);
    }
    const uint32_t keep = e.mask_a ? mask.keep8(k, row, col) : 0xFFu;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (!((keep >> j) & 1u)) v[j] = 0.0f;
    }
    store8<T>(hidden + Out::row(i) * kLd<T, BR> + col, v, 8, true);
  }

  // Tiles of this block's column group; the loop over them is a pipeline of its own, the
  // up-projection being its only operand to load.
  const MatrixView b = e.b[k];
  const int64_t width = e.widths[k], first = blockIdx.y * p.tiles_per_block;
  const int64_t end = (width + kBN - 1) / kBN,
                last = first + p.tiles_per_block < end ? first + p.tiles_per_block : end;
  run_pipeline(
      last - first,
      [&](int64_t tile) {
        const int64_t col0 = (first + tile) * kBN;
        if constexpr (B_KC) {
          load_tile<T, kBN, BR>(up_ring.b(tile), static_cast<const T*>(b.data), b.stride, b.vec,
                                col0, width, 0, rank);
        } else {
          load_tile<T, BR, kBN>(up_ring.b(tile), static_cast<const T*>(b.data), b.stride, b.vec, 0,
                                rank, col0, width);
        }
      },
      [](int64_t) { return false; },
      [&](int64_t tile) {
        typename Shape::Up product;
        product.clear();
        product.step(hidden, up_ring.b(tile));
        product.store(stage);
        __syncthreads();
        expand_epilogue<T, kBM, kBN, 1, false>(e, mask, k, stage, row0, (first + tile) * kBN);
      });
}

template <typename T, bool B_KC, bool TERMS>
const char* expand(ExpandParams p, void* stream) {
  using Shape = ExpandShape<T, B_KC>;
  p.first_tile[0] = 0;
  for (int k = 0; k < p.outputs; ++k)
    p.first_tile[k + 1] = p.first_tile[k] + ceil_div(p.widths[k], Shape::kBN);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, Shape::kBM)),
                  static_cast<unsigned>(p.first_tile[p.outputs]));
  const size_t bytes = Shape::kShared + (TERMS && p.mask_out ? Shape::kPlane : 0);
  return launch(&lowrank_expand_kernel<T, B_KC, TERMS>, grid, bytes, stream, p);
}

template <typename T, int BR, bool B_KC>
const char* update(UpdateParams p, void* stream) {
  using Shape = UpdateShape<T, BR, B_KC>;
  int64_t tiles = 0;
  for (int k = 0; k < p.expand.outputs; ++k)
    tiles = tiles > ceil_div(p.expand.widths[k], Shape::kBN)
                ? tiles
                : ceil_div(p.expand.widths[k], Shape::kBN);
  // Enough column groups for two blocks per multiprocessor, but each with at least four tiles: a
  // block repeats the shrink of its rows.
  const int64_t blocks = ceil_div(p.expand.rows, Shape::kBM) * p.expand.outputs;
  int64_t groups = ceil_div(2 * multiprocessors(), blocks > 0 ? blocks : 1);
  if (groups > ceil_div(tiles, 4)) groups = ceil_div(tiles, 4);
  p.tiles_per_block = ceil_div(tiles, groups);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.expand.rows, Shape::kBM)),
                  static_cast<unsigned>(ceil_div(tiles, p.tiles_per_block)), p.expand.outputs);
  return launch(&lowrank_update_kernel<T, BR, B_KC>, grid, Shape::kShared, stream, p);
}

}  // namespace

const char* launch_lowrank_expand(ExpandParams params, void* stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return params.terms > 1        ? expand<T, false, true>(params, stream)
           : params.b_rank_columns ? expand<T, true, false>(params, stream)
                                   : expand<T, false, false>(params, stream);
  });
}

const char* launch_lowrank_update(UpdateParams params, void* stream) {
  return dispatch_dtype(params.expand.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_bool(params.expand.b_rank_columns, [&](auto kc) {
      constexpr bool kKC = decltype(kc)::value;
      return update<T, kMaxFusedRank, kKC>(params, stream);
    });
  });
}

}  // namespace petal
