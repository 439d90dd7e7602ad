// lowrank_linear, into the bottleneck. Legend: N rows, D input width, R rank, K outputs of widths
// O_k and ranks R_k; T = fp32, fp16, bf16.
//
//   shrink   out[N, R] = sum_k s_k mask_k * (drop(a_k) b_k^T)
//            h (a = x, b = down) and dh (a_k = dy_k, b_k = ups[k])
//   separate out_k[N, R_k], the terms side by side: dh_k of own down-projections
//   own      out_k[N, R_k] = s_k drop_k(a) b_k^T, side by side, of one a: their h_k
//
// Shapes   a row-major with any row stride; b in either orientation (template B_KC: its contraction
//          index is the contiguous one); 16-byte copies where address and row stride allow
//          (MatrixView::vec), element copies otherwise; no size is a multiple of anything.
// Grid     (row blocks, rank blocks, K if separate); own: (row blocks, tiles of 64 columns, in fp32
//          32, in which every R_k is rounded up to a multiple of 16).
// Traffic  a_k from DRAM once (read once per 64 columns of R, in fp32 per 32), b_k from L2, out
//          once. own: a once for all k whose columns are in one tile, staged once, each k with its
//          mask's bits; K ranks of 16 are one tile.
// Numerics fp32 accumulators and epilogue, one rounding per output element. Dropped operand
//          elements become exact zeros, the factor of the kept ones is applied to the fp32 result.
//          fp32 products are IEEE FMAs.
// Limits   K <= 4, R_k <= 256. Every sum has a fixed order: same bits on every run.
// Source   ops/lowrank_linear/reference.py: h = drop(x) U^T, h_k = drop_k(x) A_k^T, dh.
#include "block.cuh"
#include "common/cuda/launchers.cuh"

namespace petal {
namespace {

template <typename T, int BM, int BN, bool B_KC, bool OWN>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    lowrank_shrink_kernel(const __grid_constant__ ShrinkParams p) {
  using Shape = ShrinkShape<T, BM, BN, B_KC>;
  using Out = Stage<BM, BN>;
  constexpr int kD = Shape::kD;
  PETAL_SHARED(shared);
  const typename Shape::Tiles ring{reinterpret_cast<T*>(shared)};
  float* const stage = reinterpret_cast<float*>(shared + Shape::Tiles::kBytes);
  unsigned char* const rest = shared + Shape::Tiles::kBytes + Shape::kStageBytes;
  float* const sum = reinterpret_cast<float*>(rest);  // or, own, the planes
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * BM,
                col0 = static_cast<int64_t>(blockIdx.y) * BN;
  const int first = p.separate ? blockIdx.z : 0, last = p.separate || OWN ? first + 1 : p.outputs;
  const int rank = p.ranks[first];
  if (!OWN && col0 >= rank) return;  // another k has more
  const MaskSource mask = mask_source(p.dropout);
  const float kept_scale = p.mask_a || p.mask_out ? p.dropout.scale : 1.0f;
  T* const out = static_cast<T*>(p.out.data) + p.offsets[first];
  const Slots slots{p.first_slot, 0, p.outputs, static_cast<int>(blockIdx.y) * Shape::kSlots};
  const uint32_t planes = OWN ? slots.template planes<Shape::kSlots>() : 0;

  int64_t tiles = 0;
  for (int k = first; k < last; ++k) tiles += (p.widths[k] + kD - 1) / kD;
  Cursor ahead{first, 0}, here{first, 0};
  typename Shape::Product product;
  product.clear();

  run_pipeline(
      tiles,
      [&](int64_t tile) {
        const MatrixView a = p.a[ahead.k];
        const int64_t width = p.widths[ahead.k];
        load_tile<T, BM, kD>(ring.a(tile), static_cast<const T*>(a.data), a.stride, a.vec, row0,
                             p.rows, ahead.col, width);
        if constexpr (OWN) {
#pragma unroll
          for (int s = 0; s < Shape::kSlots; ++s) {
            const int k = slots.item(s);
            const MatrixView b = p.b[k];
            load_tile<T, kSlot, kD>(ring.b(tile) + s * kTileElements<T, kSlot, kD>,
                                    static_cast<const T*>(b.data), b.stride, b.vec, slots.col(s, k),
                                    p.ranks[k], ahead.col, width);
          }
        } else if constexpr (B_KC) {
          const MatrixView b = p.b[ahead.k];
          load_tile<T, BN, kD>(ring.b(tile), static_cast<const T*>(b.data), b.stride, b.vec, col0,
                               rank, ahead.col, width);
        } else {
          const MatrixView b = p.b[ahead.k];
          load_tile<T, kD, BN>(ring.b(tile), static_cast<const T*>(b.data), b.stride, b.vec,
                               ahead.col, width, col0, rank);
        }
        ahead.advance(p.widths, kD);
      },
      [&](int64_t tile) {
        if constexpr (OWN) {
          const int from = slots.item(0), to = slots.item(Shape::kSlots - 1);
          for (int k = from; p.mask_a && k <= to; ++k)
            keep_plane<BM, kD>(rest + (k - from) * kPlaneBytes<BM, kD>, mask, k, row0, here.col);
        } else {
          if (p.mask_a) mask_tile<T, BM, kD>(ring.a(tile), mask, 0, row0, here.col);
        }
        return p.mask_a;
      },
      [&](int64_t tile) {
        if (OWN && p.mask_a) {
          product.step_kept(ring.a(tile), ring.b(tile), rest, planes);
        } else {
          product.step(ring.a(tile), ring.b(tile));
        }
        const int term = here.k;
        if (!here.advance(p.widths, kD) || (!p.apart && here.k < last)) return;
        // Every later store to the stage lies behind the barrier at the top of the pipeline, after
        // these reads. A sum of terms apart is kept in shared memory, each group of columns by the
        // thread that owns it: in registers it would cost occupancy.
        product.store(stage);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Out::kPerThread; ++i) {
          if (!Out::has(i)) continue;
          const int64_t row = row0 + Out::row(i);
          const int k = OWN ? slots.item(Out::col(i) / kSlot) : term;
          const int64_t col =
              OWN ? slots.col(Out::col(i) / kSlot, k) + Out::col(i) % kSlot : col0 + Out::col(i);
          float v[8];
          Out::template read<Shape::Product::kCopies>(v, stage, i);
#pragma unroll
          for (int j = 0; j < 8; ++j) v[j] *= p.scales[k];
          if (p.mask_out) {
            const uint32_t keep = mask.keep8(k, row, col);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] = (keep >> j) & 1u ? v[j] : 0.0f;
          }
          if (p.apart) Out::accumulate(v, sum, i, k == first);
          const int valid =
              here.k == last && row < p.rows ? valid_columns(col, OWN ? p.ranks[k] : rank, 8) : 0;
          if (valid == 0) continue;
#pragma unroll
          for (int j = 0; j < 8; ++j) v[j] *= kept_scale;
          store8<T>(out + row * p.out.stride + (OWN ? p.offsets[k] : 0) + col, v, valid, p.out.vec);
        }
        product.clear();
      });
}

template <typename T, int BM, bool B_KC, bool OWN>
const char* shrink(ShrinkParams p, void* stream) {
  constexpr int kBN = kShrinkColumns<T>;
  using Shape = ShrinkShape<T, BM, kBN, B_KC>;
  int32_t columns = 0;
  p.first_slot[0] = 0;
  for (int k = 0; k < p.outputs; ++k) {
    columns = columns > p.ranks[k] ? columns : p.ranks[k];
    p.first_slot[k + 1] = p.first_slot[k] + static_cast<int32_t>(ceil_div(p.ranks[k], kSlot));
  }
  if (OWN) columns = p.first_slot[p.outputs] * kSlot;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, BM)),
                  static_cast<unsigned>(ceil_div(columns, kBN)), p.separate ? p.outputs : 1);
  const size_t bytes = Shape::Tiles::kBytes + Shape::kStageBytes +
                       (p.apart ? sizeof(float) * Stage<BM, kBN>::kFloats : 0) +
                       (OWN && p.mask_a ? Shape::kSlots * kPlaneBytes<BM, Shape::kD> : 0);
  return launch(&lowrank_shrink_kernel<T, BM, kBN, B_KC, OWN>, grid, bytes, stream, p);
}

}  // namespace

const char* launch_lowrank_shrink(ShrinkParams params, void* stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.own) {
      return params.small ? shrink<T, 16, true, true>(params, stream)
                          : shrink<T, 64, true, true>(params, stream);
    }
    return dispatch_bool(params.b_rank_rows, [&](auto kc) {
      constexpr bool kKC = decltype(kc)::value;
      return params.small ? shrink<T, 16, kKC, false>(params, stream)
                          : shrink<T, 64, kKC, false>(params, stream);
    });
  });
}

}  // namespace petal
