// gated_bottleneck, backward over rows. Legend as in forward.cu.
//
//   u, Y, G again from z, zg and the rows;  xhat = (u - mean) rstd, g = dout norm_weight
//   du = rstd (g - mean(g) - xhat mean(g xhat)), or dout;   dv = scale drop(du);   dY = G dv
//   large: dlogit = dv Y G (1 - G), dzg = (dlogit gate_up) act'(zg), dgate_input += dzg gate_down
//   row gates: dlogit = sum(dv Y) G (1 - G), pooled: of the sample's total times the token's
//   weight; dgate_input += dlogit w_x, dH += dlogit w_h (sees_output: dY as well)
//   dq = (dY up) act'(q), dz = route'(dq), dx = dz down (+ dH where H is x)
//
// Shapes   as in forward.cu; dout with any row stride.
// Grid     blocks of 32 rows (16 in fp32 with a rank above 128). Up to three loops over columns in
//          tiles of 128 bytes: sums (a norm or a row gate: five sums per row, since sum(dv Y) is
//          linear in the two means), columns (dY up and dlogit gate_up stay in registers), and
//          dx, dgate_input over D, Dg. A pooled gate ends a launch after the sums.
// Traffic  x, gate_input, H, residual, dout from DRAM once and from L2 for the second loop; du, dH,
//          dgate_input written once, read back and written again to L2 where dz down or dzg
//          gate_down is added; z, zg read, act(q), act(zg), dz, dzg written.
// Numerics fp32 accumulators. Rounded to T: act(q), act(zg), dY and dlogit as operands, dz, dzg,
//          and dH, dgate_input before their products are added.
// Limits   ranks <= 256. Every sum has a fixed order.
// Source   ops/gated_bottleneck/reference.py.
#include "block.cuh"

namespace petal {
namespace {

template <typename T, int RANK>
struct RowsShape : GatedShape<T, RANK> {
  using Base = GatedShape<T, RANK>;
  using Back = TileProduct<T, Base::kRows, Base::kD, Base::kD, true, false, 2, 2, 1>;
  static_assert(sizeof(T) * Base::kSide <= Base::kStageBytes, "formed operands over the stages");
  static constexpr size_t kFixedBytes = Base::kColumnBytes + sizeof(RowInfo) * Base::kRows;
  static size_t bytes(bool large) {
    const size_t sides = large ? 2 : 1;
    return kFixedBytes + sides * (Base::kSideBytes + Base::kSquareBytes + Base::kStageBytes);
  }
};

// The block's shared memory. Where a product with down or gate_down is added, their pieces lie in
// `up`.
template <typename T, int RANK>
struct RowsMemory {
  using Shape = RowsShape<T, RANK>;
  float* columns;
  RowInfo* info;
  T *a, *ag, *up, *gate_up, *dy, *dlogit;
  float *stage, *gate_stage;
  __device__ __forceinline__ RowsMemory(unsigned char* shared, bool large) {
    const int sides = large ? 2 : 1;
    columns = reinterpret_cast<float*>(shared);
    info = reinterpret_cast<RowInfo*>(shared + Shape::kColumnBytes);
    a = reinterpret_cast<T*>(shared + Shape::kFixedBytes);
    ag = a + Shape::kPieces * Shape::kSide;
    up = a + sides * Shape::kPieces * Shape::kSide;
    gate_up = up + Shape::kPieces * Shape::kSquare;
    stage = reinterpret_cast<float*>(up + sides * Shape::kPieces * Shape::kSquare);
    gate_stage = stage + Shape::Out::kFloats;
    dy = reinterpret_cast<T*>(stage);  // over what they are formed from
    dlogit = reinterpret_cast<T*>(gate_stage);
  }
};

template <int LANES>
__device__ __forceinline__ float sum_lanes(float v) {
#pragma unroll
  for (int mask = 1; mask < LANES; mask *= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, mask);
  return v;
}

// mean(g), mean(g xhat) and the row gate's dlogit (pooled: the row's share of its total).
template <typename T, int RANK>
__device__ __forceinline__ void form_sums(const GatedRowsParams& p, const RowsMemory<T, RANK>& m,
                                          const MaskSource& mask, int64_t row0) {
  using Shape = RowsShape<T, RANK>;
  using Out = typename Shape::Out;
  constexpr int kD = Shape::kD;
  const GatedParams& f = p.f;
  const bool large = f.gate.rank > 0, norm = f.columns[kNormWeight].data != nullptr;
  // g, g xhat, and of what dropout keeps of Y: Y g, Y, Y xhat.
  float sums[Out::kPerThread][5] = {};
  const auto load = [&](int64_t col0) {
    load_pieces<T, RANK>(m.up, f.up, col0, f.outs, f.down.rank);
    if (large) load_pieces<T, RANK>(m.gate_up, f.gate_up, col0, f.outs, f.gate.rank);
    cp_async_commit();
  };
  load(0);
  for (int64_t col0 = 0; col0 < f.outs; col0 += kD) {
    cp_async_wait<0>();
    __syncthreads();
    load_columns<T, RANK>(m.columns, f, col0);
    multiply_pieces<T, RANK, typename Shape::Up>(m.stage, m.a, m.up, f.down.rank);
    if (large)
      multiply_pieces<T, RANK, typename Shape::Up>(m.gate_stage, m.ag, m.gate_up, f.gate.rank);
    __syncthreads();
    if (col0 + kD < f.outs) load(col0 + kD);
#pragma unroll
    for (int i = 0; i < Out::kPerThread; ++i) {
      const Place at_ = place<T, RANK>(i, row0, f.rows, col0, f.outs);
      if (at_.valid == 0) continue;
      const RowInfo& row = m.info[at_.local_row];
      const uint32_t keep = keep_bits(f, mask, at_);
      float y[8], gate[8], g[8], u[8], weight[8];
      form_values<T, RANK>(y, gate, f, m.stage, m.gate_stage, m.columns, row, at_, i);
      load8<T>(g, at<T>(p.dout, at_.row, at_.col), at_.valid, p.dout.vec);
      if (norm) {
        form_sum<T>(u, y, gate, f, keep, at_);
        read_column(weight, m.columns, kD, kNormWeight, at_.local_col);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j >= at_.valid) continue;
        const float xhat = norm ? (u[j] - row.mean) * row.rstd : 0.0f;
        g[j] = norm ? g[j] * weight[j] : g[j];
        const float kept = (keep >> j) & 1u ? y[j] : 0.0f;
        sums[i][0] += g[j];
        sums[i][1] += g[j] * xhat;
        sums[i][2] += kept * g[j];
        sums[i][3] += kept;
        sums[i][4] += kept * xhat;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Out::kPerThread; ++i) {
#pragma unroll
    for (int k = 0; k < 5; ++k) sums[i][k] = sum_lanes<kD / 8>(sums[i][k]);
    const int64_t row = row0 + Out::row(i);
    if (!Out::has(i) || Out::col(i) != 0 || row >= f.rows) continue;
    RowInfo& info = m.info[Out::row(i)];
    const float inverse = 1.0f / static_cast<float>(f.outs);
    info.mean_g = norm ? sums[i][0] * inverse : 0.0f;
    info.mean_gx = norm ? sums[i][1] * inverse : 0.0f;
    float dot = sums[i][2];
    if (norm) dot = info.rstd * (dot - info.mean_g * sums[i][3] - info.mean_gx * sums[i][4]);
    dot *= f.scale * f.dropout.scale;
    if (f.kind == Gate::kMiddleX) dot *= info.gate * (1.0f - info.gate);
    info.dlogit = dot;
    float* const row_sums = p.sums + row * kRowSums;
    row_sums[0] = info.mean_g;
    row_sums[1] = info.mean_gx;
    row_sums[2] = info.dlogit;
  }
  __syncthreads();
}

// The gradients of one column tile: what is stored, and dY and dlogit as operands.
template <typename T, int RANK>
__device__ __forceinline__ void form_tile(const GatedRowsParams& p, const RowsMemory<T, RANK>& m,
                                          const MaskSource& mask, int64_t row0, int64_t col0) {
  using Shape = RowsShape<T, RANK>;
  using Out = typename Shape::Out;
  constexpr int kD = Shape::kD;
  const GatedParams& f = p.f;
  float dy[Out::kPerThread][8] = {}, dgate[Out::kPerThread][8] = {};
#pragma unroll
  for (int i = 0; i < Out::kPerThread; ++i) {
    const Place at_ = place<T, RANK>(i, row0, f.rows, col0, f.outs);
    if (at_.valid > 0) {
      Gradients g;
      const RowInfo& row = m.info[at_.local_row];
      form_gradients<T, RANK>(g, f, p.dout, m.stage, m.gate_stage, m.columns, row, mask, at_, i);
      if (p.du.data != nullptr)
        store8<T>(at_out<T>(p.du, at_.row, at_.col), g.du, at_.valid, p.du.vec);
      float dh[8], dx[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) dh[j] = g.dy[j], dx[j] = f.adds_gate_input ? g.du[j] : 0.0f;
      if (has_row_gate(f)) {
        float wx[8], wh[8];
        read_column(wx, m.columns, kD, kInputWeight, at_.local_col);
        read_column(wh, m.columns, kD, kLogitHWeight, at_.local_col);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          dh[j] += row.dlogit * wh[j];
          dx[j] += row.dlogit * wx[j];
          if (f.sees_output) g.dy[j] = dh[j];
        }
      }
      if (p.dh.data != nullptr)
        store8<T>(at_out<T>(p.dh, at_.row, at_.col), dh, at_.valid, p.dh.vec);
      if (p.dgate_input.data != nullptr && (f.adds_gate_input || has_row_gate(f)))
        store8<T>(at_out<T>(p.dgate_input, at_.row, at_.col), dx, at_.valid, p.dgate_input.vec);
#pragma unroll
      for (int j = 0; j < 8; ++j) dy[i][j] = g.dy[j], dgate[i][j] = g.dgate[j];
    }
  }
  __syncthreads();  // the operands lie over the stages
#pragma unroll
  for (int i = 0; i < Out::kPerThread; ++i) {
    if (!Out::has(i)) continue;
    const int offset = Out::row(i) * kLd<T, kD> + Out::col(i);
    store8<T>(m.dy + offset, dy[i], 8, true);
    if (f.gate.rank > 0) store8<T>(m.dlogit + offset, dgate[i], 8, true);
  }
}

// One staged piece of da: dz = route'(da act'(route(z))), stored, and the operand of dz down.
template <typename T, int RANK>
__device__ __forceinline__ void form_dz(T* tile, const float* stage, const Bottleneck& b,
                                        const GatedParams& f, Route route, const MatrixView& dz,
                                        const MatrixView& dq, int64_t row0, int piece) {
  using Shape = RowsShape<T, RANK>;
  using Out = typename Shape::Out;
#pragma unroll 1
  for (int i = 0; i < Out::kPerThread; ++i) {
    if (!Out::has(i)) continue;
    const Place at_ = place<T, RANK>(i, row0, f.rows, piece * Shape::kD, b.rank);
    float v[8] = {};
    if (at_.valid > 0) {
      float z[8], by[8] = {};
      Out::template read<1>(v, stage, i);
      load8<T>(z, at<T>(b.z, at_.row, at_.col), at_.valid, b.z.vec);
      if (route != Route::kNone)
        load8<T>(by, at<T>(f.left, at_.row / f.length, at_.col), at_.valid, f.left.vec);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        v[j] *= derivative(f.activation, route == Route::kMul ? z[j] * by[j] : z[j] + by[j]);
      if (dq.data != nullptr) store8<T>(at_out<T>(dq, at_.row, at_.col), v, at_.valid, dq.vec);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (route == Route::kMul) v[j] *= by[j];
        if (j >= at_.valid) v[j] = 0.0f;
      }
      if (dz.data != nullptr) store8<T>(at_out<T>(dz, at_.row, at_.col), v, at_.valid, dz.vec);
    }
    store8<T>(tile + piece * Shape::kSide + at_.local_row * kLd<T, Shape::kD> + at_.local_col, v, 8,
              true);
  }
}

// out = (out or 0) + tile weight over all columns of the bottleneck's input.
template <typename T, int RANK>
__device__ __forceinline__ void add_product(const T* tile, const RowsMemory<T, RANK>& m,
                                            const Bottleneck& b, const MatrixView& out, bool adds,
                                            int64_t row0, int64_t rows) {
  using Shape = RowsShape<T, RANK>;
  using Out = typename Shape::Out;
  constexpr int kD = Shape::kD;
  const auto load = [&](int64_t col0) {
#pragma unroll 1
    for (int c = 0; c < Shape::kPieces; ++c) {
      if (c * kD < b.rank)
        load_tile<T, kD, kD>(m.up + c * Shape::kSquare, at<T>(b.weight, 0, 0), b.weight.stride,
                             b.weight.vec, c * kD, b.rank, col0, b.width);
    }
    cp_async_commit();
  };
  __syncthreads();
  load(0);
  for (int64_t col0 = 0; col0 < b.width; col0 += kD) {
    cp_async_wait<0>();
    __syncthreads();
    multiply_pieces<T, RANK, typename Shape::Back>(m.stage, tile, m.up, b.rank);
    __syncthreads();
    if (col0 + kD < b.width) load(col0 + kD);
#pragma unroll
    for (int i = 0; i < Out::kPerThread; ++i) {
      const Place at_ = place<T, RANK>(i, row0, rows, col0, b.width);
      if (at_.valid == 0) continue;
      T* const target = at_out<T>(out, at_.row, at_.col);
      float v[8], base[8] = {};
      Out::template read<1>(v, m.stage, i);
      if (adds) load8<T>(base, target, at_.valid, out.vec);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] += base[j];
      store8<T>(target, v, at_.valid, out.vec);
    }
  }
  __syncthreads();
}

template <typename T>
__device__ __forceinline__ RowInfo row_info(const GatedRowsParams& p, int64_t row) {
  const GatedParams& f = p.f;
  RowInfo info = {1.0f, 0.0f, 1.0f, 0.0f, 0.0f, 0.0f};
  if (row >= f.rows) return info;
  float slope = 0.0f;
  if (has_row_gate(f)) {
    const float s = sigmoid(f.logits[row]);
    info.gate = f.kind == Gate::kSmall ? f.pooled[row / f.length] : s;
    slope = s * (1.0f - s);
  }
  if (f.moments != nullptr) {
    info.mean = f.moments[row * 2];
    info.rstd = f.moments[row * 2 + 1];
  }
  if (p.totals != nullptr) {  // pooled: the sums of the launch before, the samples' totals
    const float weight =
        p.token_weights != nullptr ? p.token_weights[row] : 1.0f / static_cast<float>(f.length);
    info.mean_g = p.sums[row * kRowSums];
    info.mean_gx = p.sums[row * kRowSums + 1];
    info.dlogit = p.totals[row / f.length] * weight * slope;
    p.sums[row * kRowSums + 2] = info.dlogit;
  }
  return info;
}

template <typename T, int RANK>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    gated_bottleneck_bwd_rows_kernel(const __grid_constant__ GatedRowsParams p) {
  using Shape = RowsShape<T, RANK>;
  constexpr int kRows = Shape::kRows, kD = Shape::kD, kPieces = Shape::kPieces;
  PETAL_SHARED(shared);
  const GatedParams& f = p.f;
  const bool large = f.gate.rank > 0;
  const RowsMemory<T, RANK> m(shared, large);
  unsigned char* const unused = nullptr;  // nothing is projected down here
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows;
  if (p.read_dz) {
    Bottleneck dz = f.down;
    dz.z = p.dz;
    form_hidden<T, RANK>(m.a, unused, dz, Activation::kIdentity, Route::kNone, MatrixView{},
                         MatrixView{}, row0, f.rows, f.length);
    add_product<T, RANK>(m.a, m, f.down, p.dx, p.dx_on_dh, row0, f.rows);
    return;
  }
  form_hidden<T, RANK>(m.a, unused, f.down, f.activation, f.route, f.left, p.a, row0, f.rows,
                       f.length);
  if (large)
    form_hidden<T, RANK>(m.ag, unused, f.gate, f.activation, Route::kNone, MatrixView{}, p.ag, row0,
                         f.rows, f.length);
  const MaskSource mask = mask_source(f.dropout);
  if (threadIdx.x < kRows) m.info[threadIdx.x] = row_info<T>(p, row0 + threadIdx.x);
  if (p.form_sums) form_sums<T, RANK>(p, m, mask, row0);
  if (!p.form_columns) return;

  typename Shape::Back da[kPieces], dag[kPieces];
#pragma unroll
  for (int c = 0; c < kPieces; ++c) {
    da[c].clear();
    dag[c].clear();
  }
  for (int64_t col0 = 0; col0 < f.outs; col0 += kD) {
    load_pieces<T, RANK>(m.up, f.up, col0, f.outs, f.down.rank);
    if (large) load_pieces<T, RANK>(m.gate_up, f.gate_up, col0, f.outs, f.gate.rank);
    cp_async_commit();
    load_columns<T, RANK>(m.columns, f, col0);
    cp_async_wait<0>();
    __syncthreads();
    if (forms_values(f)) {
      multiply_pieces<T, RANK, typename Shape::Up>(m.stage, m.a, m.up, f.down.rank);
      if (large)
        multiply_pieces<T, RANK, typename Shape::Up>(m.gate_stage, m.ag, m.gate_up, f.gate.rank);
      __syncthreads();
    }
    form_tile<T, RANK>(p, m, mask, row0, col0);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (p.need_dz && c * kD < f.down.rank) da[c].step(m.dy, m.up + c * Shape::kSquare);
      if (p.need_dzg && c * kD < f.gate.rank) dag[c].step(m.dlogit, m.gate_up + c * Shape::kSquare);
    }
    __syncthreads();  // before the weights and vectors of the next tile
  }
#pragma unroll
  for (int c = 0; c < kPieces; ++c) {
    const bool some = p.need_dz && c * kD < f.down.rank, gate = p.need_dzg && c * kD < f.gate.rank;
    if (some) da[c].store(m.stage);
    if (gate) dag[c].store(m.gate_stage);
    __syncthreads();
    if (some) form_dz<T, RANK>(m.a, m.stage, f.down, f, f.route, p.dz, p.dq, row0, c);
    if (gate)
      form_dz<T, RANK>(m.ag, m.gate_stage, f.gate, f, Route::kNone, p.dzg, MatrixView{}, row0, c);
    __syncthreads();
  }
  if (p.dx.data != nullptr) add_product<T, RANK>(m.a, m, f.down, p.dx, p.dx_on_dh, row0, f.rows);
  if (large && p.dgate_input.data != nullptr)
    add_product<T, RANK>(m.ag, m, f.gate, p.dgate_input, f.adds_gate_input, row0, f.rows);
}

}  // namespace

const char* launch_gated_bottleneck_bwd_rows(const GatedRowsParams& params, void* stream) {
  return dispatch_gated(params.f.dtype, widest_rank(params.f), [&](auto tag, auto rank) {
    using T = typename decltype(tag)::type;
    using Shape = RowsShape<T, decltype(rank)::value>;
    const dim3 grid(static_cast<unsigned>(ceil_div(params.f.rows, Shape::kRows)));
    return launch(&gated_bottleneck_bwd_rows_kernel<T, decltype(rank)::value>, grid,
                  Shape::bytes(params.f.gate.rank > 0), stream, params);
  });
}

size_t gated_bottleneck_bwd_rows_bytes(DType dtype, int rank, int gate_rank) {
  size_t bytes = 0;
  dispatch_gated(dtype, rank > gate_rank ? rank : gate_rank, [&](auto tag, auto wide) {
    bytes = RowsShape<typename decltype(tag)::type, decltype(wide)::value>::bytes(gate_rank > 0);
    return static_cast<const char*>(nullptr);
  });
  return bytes;
}

}  // namespace petal
