// gated_bottleneck, forward. Legend: N rows, L of one sample, D input width, r rank, O output
// width, Dg and rg of the large gate; H is base or x, f is relu or nothing, gate_weight is (w_x,
// w_h) or w; every other name is an argument's; T = fp32, fp16, bf16.
//
//   z = x down^T + down_bias, zg = gate_input gate_down^T + gate_down_bias   rounded to T, stored
//   Y = H + act(route(z)) up^T + up_bias   route: none, + left, * left, or (f(z) . left) right of
//                                          one vision token (through more: the library's product)
//   G = 1 | sigmoid(act(zg) gate_up^T + gate_up_bias) | per row
//       sigmoid(w_x . gate_input + w_h . H + gate_bias) | per column 1 + sigmoid(w) | per sample
//       the pooled row gate
//   out = u or LayerNorm(u), u = residual + scale drop(G Y)
//
// Shapes   row matrices with any row stride; weights row-major, any row stride; vectors with any
//          stride in T or fp32; 16-byte copies where address and row stride allow. No size is a
//          multiple of anything.
// Grid     fwd: blocks of 32 rows (16 in fp32 with a rank above 128): z of its rows in one loop
//          over D, then all columns in tiles of 128 bytes, the next tile's weights being copied
//          while this one is finished. pool: a warp per sample.
// Traffic  x, gate_input, H, residual from DRAM once (where H is x and the residual gate_input,
//          they come again from L2), z, zg, out written once; with a norm out is read back three
//          times from L1 and written again to L2. Weights from L2 per block. A pooled gate needs x
//          and gate_input a second time: its sum over the sample lies between two launches.
// Numerics fp32 accumulators and epilogue, IEEE products in fp32. Rounded to T: z, zg, q of a
//          product, act(q), act(zg), u (before a norm), out. Moments: the mean first, then squared
//          deviations of the rounded u. Dropped elements add nothing to the residual, whatever
//          they were.
// Limits   ranks <= 256. Every sum has a fixed order: same bits on every run.
// Source   ops/gated_bottleneck/reference.py.
#include "block.cuh"

namespace petal {
namespace {

template <typename T, int RANK>
struct FwdShape : GatedShape<T, RANK> {
  using Base = GatedShape<T, RANK>;
  static constexpr size_t kFixedBytes = Base::kColumnBytes + sizeof(RowInfo) * Base::kRows;
  static size_t bytes(bool large, bool forms, bool finishes) {
    const size_t sides = large ? 2 : 1;
    const size_t columns = finishes ? sides * (Base::kSquareBytes + Base::kStageBytes) : 0;
    const size_t ring = forms ? Base::Tiles::kBytes : 0;
    return sides * Base::kSideBytes + kFixedBytes + (columns > ring ? columns : ring);
  }
};

// tile = act(q) of f(z) in the tile, q = (f(z) . left) right: the rows of a warp side by side.
template <typename T, int RANK>
__device__ __forceinline__ void route_outer(T* tile, const GatedParams& p, int64_t row0) {
  constexpr int kMine = GatedShape<T, RANK>::kRows / (kThreads / kWarp);
  const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kMine;
  int64_t sample[kMine];
  float sum[kMine] = {};
#pragma unroll
  for (int r = 0; r < kMine; ++r) {
    const int64_t row = row0 + first + r;
    sample[r] = (row < p.rows ? row : p.rows - 1) / p.length;  // beyond the end: any, of zeros
  }
  for (int c = lane; c < p.down.rank; c += kWarp) {
#pragma unroll
    for (int r = 0; r < kMine; ++r)
      sum[r] += to_float(tile[hidden_offset<T, RANK>(first + r, c)]) *
                to_float(*at<T>(p.left, sample[r], c));
  }
#pragma unroll
  for (int r = 0; r < kMine; ++r) sum[r] = warp_sum(sum[r]);
  for (int c = lane; c < p.down.rank; c += kWarp) {
#pragma unroll
    for (int r = 0; r < kMine; ++r) {
      const float q = to_float(from_float<T>(sum[r] * to_float(*at<T>(p.right, sample[r], c))));
      tile[hidden_offset<T, RANK>(first + r, c)] = from_float<T>(activate(p.activation, q));
    }
  }
}

// The logits of the rows of a warp, eight at most at a time: w_x . gate_input + w_h . H
// (+ weight_a . a) + bias.
template <typename T, int RANK>
__device__ __forceinline__ void form_logits(RowInfo* info, const T* a, const GatedParams& p,
                                            int64_t row0) {
  using Shape = GatedShape<T, RANK>;
  constexpr int kMine = Shape::kRows / (kThreads / kWarp);
  const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kMine;
  float sum[kMine] = {};
  const VectorView wx = p.columns[kInputWeight], wh = p.columns[kLogitHWeight];
  for (int64_t col = lane * 8; col < p.outs; col += kWarp * 8) {
    const int valid = valid_columns(col, p.outs, 8);
    float x[8], h[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      x[j] = j < valid ? element<T>(wx, col + j) : 0.0f;
      h[j] = j < valid ? element<T>(wh, col + j) : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < kMine; ++r) {
      const int64_t row = row0 + first + r;
      if (row >= p.rows) continue;
      float v[8];
      load8<T>(v, at<T>(p.gate_input, row, col), valid, p.gate_input.vec);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[r] += j < valid ? x[j] * v[j] : 0.0f;
      if (p.h.data == nullptr) continue;
      load8<T>(v, at<T>(p.h, row, col), valid, p.h.vec);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[r] += j < valid ? h[j] * v[j] : 0.0f;
    }
  }
  if (p.sees_output) {
    for (int c = lane; c < p.down.rank; c += kWarp) {
      const float weight_a = p.weight_a[c];
#pragma unroll
      for (int r = 0; r < kMine; ++r)
        sum[r] += weight_a * to_float(a[hidden_offset<T, RANK>(first + r, c)]);
    }
  }
#pragma unroll
  for (int r = 0; r < kMine; ++r) {
    const int64_t row = row0 + first + r;
    const float logit =
        warp_sum(sum[r]) + (p.gate_bias.data != nullptr ? element<T>(p.gate_bias, 0) : 0.0f);
    if (lane != 0 || row >= p.rows) continue;
    if (p.logits != nullptr) p.logits[row] = logit;
    info[first + r].gate = sigmoid(logit);
  }
}

// out = LayerNorm(out), a row per warp.
template <typename T>
__device__ __forceinline__ void normalise(const GatedParams& p, int64_t row0, int rows) {
  const int lane = threadIdx.x % kWarp;
  const VectorView weight = p.columns[kNormWeight], bias = p.columns[kNormBias];
  const float inverse = 1.0f / static_cast<float>(p.outs);
  for (int r = threadIdx.x / kWarp; r < rows; r += kThreads / kWarp) {
    T* const out = at_out<T>(p.out, row0 + r, 0);
    float v[8], sum = 0.0f, squares = 0.0f;
    for (int64_t col = lane * 8; col < p.outs; col += kWarp * 8) {
      load8<T>(v, out + col, valid_columns(col, p.outs, 8), p.out.vec);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += v[j];
    }
    const float mean = warp_sum(sum) * inverse;
    for (int64_t col = lane * 8; col < p.outs; col += kWarp * 8) {
      const int valid = valid_columns(col, p.outs, 8);
      load8<T>(v, out + col, valid, p.out.vec);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares += j < valid ? (v[j] - mean) * (v[j] - mean) : 0.0f;
    }
    const float rstd = 1.0f / sqrtf(warp_sum(squares) * inverse + p.eps);
    for (int64_t col = lane * 8; col < p.outs; col += kWarp * 8) {
      const int valid = valid_columns(col, p.outs, 8);
      load8<T>(v, out + col, valid, p.out.vec);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < valid)
          v[j] = (v[j] - mean) * rstd * element<T>(weight, col + j) + element<T>(bias, col + j);
      }
      store8<T>(out + col, v, valid, p.out.vec);
    }
    if (lane == 0 && p.moments != nullptr) {
      p.moments[(row0 + r) * 2] = mean;
      p.moments[(row0 + r) * 2 + 1] = rstd;
    }
  }
}

template <typename T, int RANK>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    gated_bottleneck_fwd_kernel(const __grid_constant__ GatedParams p) {
  using Shape = FwdShape<T, RANK>;
  using Out = typename Shape::Out;
  constexpr int kRows = Shape::kRows, kD = Shape::kD;
  PETAL_SHARED(shared);
  const bool large = p.gate.rank > 0;
  T* const a = reinterpret_cast<T*>(shared);
  T* const ag = a + Shape::kPieces * Shape::kSide;
  unsigned char* const fixed = shared + (large ? 2 : 1) * Shape::kSideBytes;
  float* const columns = reinterpret_cast<float*>(fixed);
  RowInfo* const info = reinterpret_cast<RowInfo*>(fixed + Shape::kColumnBytes);
  unsigned char* const scratch = fixed + Shape::kFixedBytes;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows;

  const bool outer = p.route == Route::kProduct;
  const Activation f = p.route_relu ? Activation::kRelu : Activation::kIdentity;
  form_hidden<T, RANK>(a, scratch, p.down, outer ? f : p.activation, outer ? Route::kNone : p.route,
                       p.left, MatrixView{}, row0, p.rows, p.length);
  if (outer) {
    __syncthreads();  // rows of a warp, columns of all
    route_outer<T, RANK>(a, p, row0);
  }
  if (large)
    form_hidden<T, RANK>(ag, scratch, p.gate, p.activation, Route::kNone, MatrixView{},
                         MatrixView{}, row0, p.rows, p.length);
  __syncthreads();
  if (p.form_logits) {
    form_logits<T, RANK>(info, a, p, row0);
  } else if (threadIdx.x < kRows) {
    const int64_t row = row0 + threadIdx.x;
    info[threadIdx.x].gate = p.pooled != nullptr && row < p.rows ? p.pooled[row / p.length] : 1.0f;
  }
  if (p.out.data == nullptr) return;

  T* const up = reinterpret_cast<T*>(scratch);
  T* const gate_up = up + Shape::kPieces * Shape::kSquare;
  float* const stage = reinterpret_cast<float*>(scratch + (large ? 2 : 1) * Shape::kSquareBytes);
  float* const gate_stage = stage + Out::kFloats;
  const MaskSource mask = mask_source(p.dropout);
  const auto load = [&](int64_t col0) {
    load_pieces<T, RANK>(up, p.up, col0, p.outs, p.down.rank);
    if (large) load_pieces<T, RANK>(gate_up, p.gate_up, col0, p.outs, p.gate.rank);
    cp_async_commit();
  };
  load(0);
  for (int64_t col0 = 0; col0 < p.outs; col0 += kD) {
    cp_async_wait<0>();
    __syncthreads();  // the weights are there, and all are done with the stages and the vectors
    load_columns<T, RANK>(columns, p, col0);
    multiply_pieces<T, RANK, typename Shape::Up>(stage, a, up, p.down.rank);
    if (large) multiply_pieces<T, RANK, typename Shape::Up>(gate_stage, ag, gate_up, p.gate.rank);
    __syncthreads();
    if (col0 + kD < p.outs) load(col0 + kD);
#pragma unroll
    for (int i = 0; i < Out::kPerThread; ++i) {
      const Place at_ = place<T, RANK>(i, row0, p.rows, col0, p.outs);
      if (at_.valid == 0) continue;
      float y[8], gate[8], sum[8];
      form_values<T, RANK>(y, gate, p, stage, gate_stage, columns, info[at_.local_row], at_, i);
      form_sum<T>(sum, y, gate, p, keep_bits(p, mask, at_), at_);
      store8<T>(at_out<T>(p.out, at_.row, at_.col), sum, at_.valid, p.out.vec);
    }
  }
  if (p.columns[kNormWeight].data == nullptr) return;
  __syncthreads();  // the block's own rows, read back by other threads
  const int64_t remaining = p.rows - row0;
  normalise<T>(p, row0, remaining < kRows ? static_cast<int>(remaining) : kRows);
}

__global__ void __launch_bounds__(kThreads)
    gated_bottleneck_pool_kernel(const __grid_constant__ GatedPoolParams p) {
  const int64_t sample =
      static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (sample >= p.samples) return;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % kWarp; i < p.length; i += kWarp) {
    const int64_t row = sample * p.length + i;
    const float v = p.values[row * p.stride];
    const float weight = p.token_weights != nullptr ? p.token_weights[row] : 1.0f;
    sum += p.sigmoid ? weight * sigmoid(v) : v;
  }
  sum = warp_sum(sum);
  if (p.sigmoid && p.token_weights == nullptr) sum /= static_cast<float>(p.length);
  if (threadIdx.x % kWarp == 0) p.out[sample] = sum;
}

}  // namespace

const char* launch_gated_bottleneck_fwd(const GatedParams& params, void* stream) {
  return dispatch_gated(params.dtype, widest_rank(params), [&](auto tag, auto rank) {
    using T = typename decltype(tag)::type;
    using Shape = FwdShape<T, decltype(rank)::value>;
    const dim3 grid(static_cast<unsigned>(ceil_div(params.rows, Shape::kRows)));
    const size_t bytes = Shape::bytes(params.gate.rank > 0, params.down.form || params.gate.form,
                                      params.out.data != nullptr);
    return launch(&gated_bottleneck_fwd_kernel<T, decltype(rank)::value>, grid, bytes, stream,
                  params);
  });
}

size_t gated_bottleneck_fwd_bytes(DType dtype, int rank, int gate_rank) {
  size_t bytes = 0;
  dispatch_gated(dtype, rank > gate_rank ? rank : gate_rank, [&](auto tag, auto wide) {
    using Shape = FwdShape<typename decltype(tag)::type, decltype(wide)::value>;
    bytes = Shape::bytes(gate_rank > 0, true, true);
    return static_cast<const char*>(nullptr);
  });
  return bytes;
}

const char* launch_gated_bottleneck_pool(const GatedPoolParams& params, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(params.samples, kThreads / kWarp)));
  return launch(&gated_bottleneck_pool_kernel, grid, 0, stream, params);
}

}  // namespace petal
