// gated_bottleneck, the reductions over rows. Legend as in forward.cu; backward.cu leaves
// a = act(q), ag = act(zg), dz, dzg and the row sums.
//
//   dup = dY^T a, dgate_up = dlogit^T ag, ddown^T = x^T dz, dgate_down^T = gate_input^T dzg, and
//   sums over rows: dY, dlogit (large), dv Y (middleY), dlogit gate_input and dlogit H or Y (row
//   gates), dout xhat, dout (norm); dv = scale drop(du)
//
// Shapes   as in forward.cu; targets of the reduce at any two strides, in T or fp32.
// Grid     weights: (column tiles of 128 bytes of O, D and Dg, 128 columns of the ranks, splits of
//          the rows). A block of O keeps its columns' weights in shared memory, goes through its
//          rows in blocks of 32 (16 in fp32 with a rank above 128), forms dY and dlogit of its
//          columns again and multiplies them from shared memory; a block of D or Dg is a plain
//          product. reduce: (32 x 32 tiles of all targets).
// Traffic  x, gate_input, H, residual, dout from DRAM once: blocks of the same rows run side by
//          side, so that what several of them read comes from L2. a, ag, dz, dzg once per column
//          tile, from L2; fp32 partials [splits, O (r + rg + sums) + D r + Dg rg] written and read
//          once.
// Numerics dY and dlogit rounded to T as operands; fp32 accumulators, partials and column sums; the
//          reduce adds the splits in ascending order and rounds once.
// Limits   ranks <= 256; any N, D, O and Dg. Same bits on every run: the splits depend on N alone.
// Source   ops/gated_bottleneck/reference.py.
#include "block.cuh"

namespace petal {
namespace {

template <typename T, int RANK>
struct WeightsShape : GatedShape<T, RANK> {
  using Base = GatedShape<T, RANK>;
  using Base::kD, Base::kRows, Base::kSide;
  static constexpr int kRanks = RANK < 128 ? RANK : 128;  // per block
  static constexpr int kMine = kRanks / kD;
  using Weight = TileProduct<T, kD, kD, kRows, false, false, 2, 2, 1>;
  using Result = Stage<kD, kD>;
  using Rows = Ring<T, kSide, kMine * kSide>;  // of a plain product
  static constexpr size_t kResultBytes = sizeof(float) * Result::kFloats;
  static constexpr size_t kSumBytes = sizeof(float) * kColumnSums * kThreads * 8;
  static constexpr size_t kFixedBytes = Base::kColumnBytes + sizeof(RowInfo) * kRows;
  // The stages are followed by the formed operands; a result lies over both.
  static size_t bytes(bool large, bool columns_too, bool sums) {
    const size_t sides = large ? 2 : 1;
    const size_t formed = sides * (Base::kStageBytes + sizeof(T) * kSide);
    const size_t columns = kFixedBytes + (sums ? kSumBytes : 0) +
                           sides * (Base::kSideBytes + Base::kSquareBytes) +
                           (formed > kResultBytes ? formed : kResultBytes);
    const size_t plain = Rows::kBytes > kResultBytes ? Rows::kBytes : kResultBytes;
    return !columns_too || plain > columns ? plain : columns;
  }
};

// The rows of a stored activation; zeros beyond `end` and the rank.
template <typename T, int RANK>
__device__ __forceinline__ void load_side(T* tile, const MatrixView& m, int64_t row0, int64_t end,
                                          int rank) {
  using Shape = GatedShape<T, RANK>;
#pragma unroll 1
  for (int c = 0; c < Shape::kPieces; ++c) {
    if (c * Shape::kD < rank)
      load_tile<T, Shape::kRows, Shape::kD>(tile + c * Shape::kSide, at<T>(m, 0, 0), m.stride,
                                            m.vec, row0, end, c * Shape::kD, rank);
  }
}

// slot += v: a thread's own running sum in shared memory; in registers it would cost a spill.
__device__ __forceinline__ void add_slot(float* slots, ColumnSum kind, const float (&v)[8]) {
  float* const p = slots + (kind * kThreads + threadIdx.x) * 8;
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    Pack<float> pack = *reinterpret_cast<const Pack<float>*>(p + j);
#pragma unroll
    for (int e = 0; e < 4; ++e) pack.e[e] += v[j + e];
    *reinterpret_cast<Pack<float>*>(p + j) = pack;
  }
}

// dY and dlogit of a tile as operands, and the column sums.
template <typename T, int RANK>
__device__ __forceinline__ void form_operands(const GatedWeightsParams& p, float* slots, T* dy,
                                              T* dlogit, const float* stage,
                                              const float* gate_stage, const float* columns,
                                              const RowInfo* info, const MaskSource& mask,
                                              int64_t row0, int64_t end, int64_t col0) {
  using Shape = WeightsShape<T, RANK>;
  using Out = typename Shape::Out;
  const GatedParams& f = p.f;
#pragma unroll 1
  for (int i = 0; i < Out::kPerThread; ++i) {
    if (!Out::has(i)) continue;
    const Place at_ = place<T, RANK>(i, row0, end, col0, f.outs);
    Gradients g = {};
    if (at_.valid > 0) {
      const RowInfo& row = info[at_.local_row];
      form_gradients<T, RANK>(g, f, p.dout, stage, gate_stage, columns, row, mask, at_, i);
      float v[8];
      if (has_row_gate(f)) {
        if (p.wanted >> kSumGate & 1u) {
          float logit_h[8] = {};
          load8<T>(v, at<T>(f.gate_input, at_.row, at_.col), at_.valid, f.gate_input.vec);
          if (!f.sees_output && f.h.data != nullptr)
            load8<T>(logit_h, at<T>(f.h, at_.row, at_.col), at_.valid, f.h.vec);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            logit_h[j] = row.dlogit * (f.sees_output ? g.y[j] : logit_h[j]);
            v[j] = row.dlogit * v[j] + (f.kind == Gate::kMiddleX ? logit_h[j] : 0.0f);
          }
          add_slot(slots, kSumGate, v);
          if (f.kind == Gate::kSmall) add_slot(slots, kSumLogitH, logit_h);
        }
        if (f.sees_output) {
          read_column(v, columns, Shape::kD, kLogitHWeight, at_.local_col);
#pragma unroll
          for (int j = 0; j < 8; ++j) g.dy[j] += row.dlogit * v[j];
        }
      } else if (p.wanted >> kSumGate & 1u) {
        add_slot(slots, kSumGate, g.dgate);
      }
      if (p.wanted >> kSumUpBias & 1u) add_slot(slots, kSumUpBias, g.dy);
      if (p.wanted >> kSumNormBias & 1u) add_slot(slots, kSumNormBias, g.dout);
      if (p.wanted >> kSumNormWeight & 1u) {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = g.dout[j] * g.xhat[j];
        add_slot(slots, kSumNormWeight, v);
      }
    }
    const int offset = at_.local_row * kLd<T, Shape::kD> + at_.local_col;
    store8<T>(dy + offset, g.dy, 8, true);
    if (f.gate.rank > 0) store8<T>(dlogit + offset, g.dgate, 8, true);
  }
}

template <typename T, int RANK>
__device__ __forceinline__ void store_partial(const float* stage, float* partial, int64_t outs,
                                              int rank, int rank0, int64_t col0) {
  using Result = typename WeightsShape<T, RANK>::Result;
#pragma unroll 1
  for (int i = 0; i < Result::kPerThread; ++i) {
    if (!Result::has(i)) continue;
    const int64_t col = col0 + Result::row(i);
    const int valid = col < outs ? valid_columns(rank0 + Result::col(i), rank, 8) : 0;
    float v[8];
    Result::template read<1>(v, stage, i);
    if (valid > 0)
      store8<float>(partial + col * rank + rank0 + Result::col(i), v, valid, rank % 4 == 0);
  }
}

// in^T dz over the block's rows for one tile of columns and its part of the rank.
template <typename T, int RANK>
__device__ __forceinline__ void down_product(unsigned char* shared, const DownGrad& d, int64_t tile,
                                             int piece0, int64_t split, int64_t first,
                                             int64_t end) {
  using Shape = WeightsShape<T, RANK>;
  constexpr int kD = Shape::kD, kRows = Shape::kRows, kMine = Shape::kMine;
  const typename Shape::Rows ring{reinterpret_cast<T*>(shared)};
  float* const stage = reinterpret_cast<float*>(shared);
  const int64_t col0 = tile * kD;
  typename Shape::Weight product[kMine];
#pragma unroll
  for (int c = 0; c < kMine; ++c) product[c].clear();
  run_pipeline(
      end > first ? (end - first + kRows - 1) / kRows : 0,
      [&](int64_t t) {
        const int64_t row0 = first + t * kRows;
        load_tile<T, kRows, kD>(ring.a(t), at<T>(d.in, 0, 0), d.in.stride, d.in.vec, row0, end,
                                col0, d.width);
#pragma unroll 1
        for (int c = 0; c < kMine; ++c) {
          if ((piece0 + c) * kD < d.rank)
            load_tile<T, kRows, kD>(ring.b(t) + c * Shape::kSide, at<T>(d.dz, 0, 0), d.dz.stride,
                                    d.dz.vec, row0, end, (piece0 + c) * kD, d.rank);
        }
      },
      [](int64_t) { return false; },
      [&](int64_t t) {
#pragma unroll
        for (int c = 0; c < kMine; ++c) {
          if ((piece0 + c) * kD < d.rank) product[c].step(ring.a(t), ring.b(t) + c * Shape::kSide);
        }
      });
#pragma unroll
  for (int c = 0; c < kMine; ++c) {
    const int rank0 = (piece0 + c) * kD;
    if (rank0 >= d.rank) continue;
    __syncthreads();  // the stage lies over the ring and the piece before
    product[c].store(stage);
    __syncthreads();
    store_partial<T, RANK>(stage, d.partial + split * d.width * d.rank, d.width, d.rank, rank0,
                           col0);
  }
}

template <typename T, int RANK>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    gated_bottleneck_bwd_weights_kernel(const __grid_constant__ GatedWeightsParams p) {
  using Shape = WeightsShape<T, RANK>;
  constexpr int kD = Shape::kD, kRows = Shape::kRows, kMine = Shape::kMine;
  PETAL_SHARED(shared);
  const GatedParams& f = p.f;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * kD, split = blockIdx.z;
  const int64_t first = split * p.rows_per_split,
                end = first + p.rows_per_split < f.rows ? first + p.rows_per_split : f.rows;
  const int piece0 = blockIdx.y * kMine;
  if (static_cast<int64_t>(blockIdx.x) >= p.first_tile[0]) {
    const int j = static_cast<int64_t>(blockIdx.x) >= p.first_tile[1] ? 1 : 0;
    down_product<T, RANK>(shared, p.down[j], blockIdx.x - p.first_tile[j], piece0, split, first,
                          end);
    return;
  }
  const bool large = f.gate.rank > 0;
  const int sides = large ? 2 : 1;
  float* const columns = reinterpret_cast<float*>(shared);
  RowInfo* const info = reinterpret_cast<RowInfo*>(shared + Shape::kColumnBytes);
  float* const slots = reinterpret_cast<float*>(shared + Shape::kFixedBytes);
  T* const a =
      reinterpret_cast<T*>(shared + Shape::kFixedBytes + (p.wanted != 0 ? Shape::kSumBytes : 0));
  T* const ag = a + Shape::kPieces * Shape::kSide;
  T* const up = a + sides * Shape::kPieces * Shape::kSide;
  T* const gate_up = up + Shape::kPieces * Shape::kSquare;
  float* const stage = reinterpret_cast<float*>(up + sides * Shape::kPieces * Shape::kSquare);
  float* const gate_stage = stage + Shape::Out::kFloats;
  T* const dy = reinterpret_cast<T*>(stage + sides * Shape::Out::kFloats);
  T* const dlogit = dy + Shape::kSide;

  const MaskSource mask = mask_source(f.dropout);
  load_pieces<T, RANK>(up, f.up, col0, f.outs, f.down.rank);
  if (large) load_pieces<T, RANK>(gate_up, f.gate_up, col0, f.outs, f.gate.rank);
  load_columns<T, RANK>(columns, f, col0);
  if (p.wanted != 0) {
    for (int i = threadIdx.x; i < kColumnSums * kThreads * 8; i += kThreads) slots[i] = 0.0f;
  }
  typename Shape::Weight dup[kMine], dgate_up[kMine];
#pragma unroll
  for (int c = 0; c < kMine; ++c) {
    dup[c].clear();
    dgate_up[c].clear();
  }
  for (int64_t row0 = first; row0 < end; row0 += kRows) {
    load_side<T, RANK>(a, p.a, row0, end, f.down.rank);
    if (large) load_side<T, RANK>(ag, p.ag, row0, end, f.gate.rank);
    cp_async_commit();
    if (threadIdx.x < kRows && row0 + threadIdx.x < end) {
      const int64_t row = row0 + threadIdx.x;
      RowInfo r = {1.0f, 0.0f, 1.0f, 0.0f, 0.0f, 0.0f};
      if (f.kind == Gate::kMiddleX) r.gate = sigmoid(f.logits[row]);
      if (f.kind == Gate::kSmall) r.gate = f.pooled[row / f.length];
      if (f.moments != nullptr) {
        r.mean = f.moments[row * 2];
        r.rstd = f.moments[row * 2 + 1];
      }
      if (p.sums != nullptr) {
        r.mean_g = p.sums[row * kRowSums];
        r.mean_gx = p.sums[row * kRowSums + 1];
        r.dlogit = p.sums[row * kRowSums + 2];
      }
      info[threadIdx.x] = r;
    }
    cp_async_wait<0>();
    __syncthreads();
    if (forms_values(f)) {
      multiply_pieces<T, RANK, typename Shape::Up>(stage, a, up, f.down.rank);
      if (large) multiply_pieces<T, RANK, typename Shape::Up>(gate_stage, ag, gate_up, f.gate.rank);
      __syncthreads();
    }
    form_operands<T, RANK>(p, slots, dy, dlogit, stage, gate_stage, columns, info, mask, row0, end,
                           col0);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kMine; ++c) {
      const int piece = piece0 + c;
      if (p.need_up && piece * kD < f.down.rank) dup[c].step(dy, a + piece * Shape::kSide);
      if (p.need_gate_up && piece * kD < f.gate.rank)
        dgate_up[c].step(dlogit, ag + piece * Shape::kSide);
    }
    __syncthreads();  // before the operands of the next rows
  }
#pragma unroll
  for (int c = 0; c < kMine; ++c) {
    const int rank0 = (piece0 + c) * kD;
    if (p.need_up && rank0 < f.down.rank) {
      dup[c].store(stage);
      __syncthreads();
      store_partial<T, RANK>(stage, p.partial_up + split * f.outs * f.down.rank, f.outs,
                             f.down.rank, rank0, col0);
      __syncthreads();
    }
    if (p.need_gate_up && rank0 < f.gate.rank) {
      dgate_up[c].store(stage);
      __syncthreads();
      store_partial<T, RANK>(stage, p.partial_gate_up + split * f.outs * f.gate.rank, f.outs,
                             f.gate.rank, rank0, col0);
      __syncthreads();
    }
  }
  if (p.wanted == 0 || piece0 != 0) return;
  __syncthreads();
  const int64_t col = col0 + threadIdx.x;
  if (threadIdx.x >= kD || col >= f.outs) return;
  constexpr int kGroups = kD / 8;
  for (int kind = 0; kind < kColumnSums; ++kind) {
    float sum = 0.0f;
    for (int t = threadIdx.x / 8; t < kThreads; t += kGroups)
      sum += slots[(kind * kThreads + t) * 8 + threadIdx.x % 8];
    p.partial_sums[(split * kColumnSums + kind) * f.outs + col] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    gated_bottleneck_bwd_reduce_kernel(const __grid_constant__ GatedReduceParams p) {
  int j = 0;
  while (static_cast<int64_t>(blockIdx.x) >= p.first_tile[j + 1]) ++j;
  const GatedReduce& job = p.job[j];
  const int64_t tile = static_cast<int64_t>(blockIdx.x) - p.first_tile[j],
                across = (job.cols + kReduceTile - 1) / kReduceTile;
  const ReduceTarget target{job.out, job.dtype, job.stride_row, job.stride_col, 1.0f};
  reduce_tile(job.partial, job.split_stride, p.splits, job.rows, job.cols,
              tile / across * kReduceTile, tile % across * kReduceTile, target);
}

}  // namespace

const char* launch_gated_bottleneck_bwd_weights(GatedWeightsParams params, void* stream) {
  const int ranks = widest_rank(params.f);
  return dispatch_gated(params.f.dtype, ranks, [&](auto tag, auto rank) {
    using T = typename decltype(tag)::type;
    using Shape = WeightsShape<T, decltype(rank)::value>;
    params.rows_per_split =
        ceil_div(ceil_div(params.f.rows, params.splits), Shape::kRows) * Shape::kRows;
    const bool columns = params.need_up || params.need_gate_up || params.wanted != 0;
    params.first_tile[0] = columns ? ceil_div(params.f.outs, Shape::kD) : 0;
    for (int j = 0; j < 2; ++j)
      params.first_tile[j + 1] = params.first_tile[j] + ceil_div(params.down[j].width, Shape::kD);
    const dim3 grid(static_cast<unsigned>(params.first_tile[2]),
                    static_cast<unsigned>(ceil_div(ranks, Shape::kRanks)),
                    static_cast<unsigned>(params.splits));
    const size_t bytes = Shape::bytes(params.f.gate.rank > 0, columns, params.wanted != 0);
    return launch(&gated_bottleneck_bwd_weights_kernel<T, decltype(rank)::value>, grid, bytes,
                  stream, params);
  });
}

size_t gated_bottleneck_bwd_weights_bytes(DType dtype, int rank, int gate_rank) {
  size_t bytes = 0;
  dispatch_gated(dtype, rank > gate_rank ? rank : gate_rank, [&](auto tag, auto wide) {
    using Shape = WeightsShape<typename decltype(tag)::type, decltype(wide)::value>;
    bytes = Shape::bytes(gate_rank > 0, true, true);
    return static_cast<const char*>(nullptr);
  });
  return bytes;
}

const char* launch_gated_bottleneck_bwd_reduce(GatedReduceParams params, void* stream) {
  params.first_tile[0] = 0;
  for (int j = 0; j < params.jobs; ++j)
    params.first_tile[j + 1] = params.first_tile[j] + ceil_div(params.job[j].rows, kReduceTile) *
                                                          ceil_div(params.job[j].cols, kReduceTile);
  const dim3 grid(static_cast<unsigned>(params.first_tile[params.jobs]));
  return launch(&gated_bottleneck_bwd_reduce_kernel, grid, kReduceBytes, stream, params);
}

}  // namespace petal
