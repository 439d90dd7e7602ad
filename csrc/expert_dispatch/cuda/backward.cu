// expert_dispatch, backward over rows. Legend as in forward.cu.
//
//   t_e  = dout up_e;   a_e = act(z_e), ga_e = g_e a_e;   dz_e = mix g_e t_e act'(z_e)
//   dg_e = mix (<t_e, a_e> + <dout, up_bias_e>), 0 where e was not chosen
//   dl_e = p_e (dg_e - sum_j g_j dg_j) + what losses add; p = g, or the softmax over all
//   dx   = keep dout (where H is x) + sum_e dz_e down_e + dl router
//
// Shapes   as there; dout with any row stride.
// Grid     stationary: blocks of 32 tokens do all of it, t for 64 columns of the bottlenecks at a
//          time, dx in tiles of 64 columns. sorted: a launch over slots for t, dz, ga and dg
//          (blocks of 32 slots of one expert), then one over tokens for dl and dx.
// Traffic  stationary: dout from DRAM once (L2 serves its second reading and each 64 columns of t),
//          z read, dz and ga written, dx written once. sorted: dout k times by slots and once by
//          tokens.
// Numerics fp32 accumulators and gates; rounded to T: dz, ga, dx. A row's dg is a sum over its
//          columns in order.
// Limits   r <= 256, E <= 64. Every sum has a fixed order.
// Source   ops/expert_dispatch/reference.py.
#include "gates.cuh"

namespace petal {
namespace {

// dz and ga of the block's rows, and dg of the experts they chose.
template <typename T>
__device__ __forceinline__ void form_dz(const ExpertMemory<T>& m, const ExpertRowsParams& p,
                                        const ExpertSpan& span) {
  using Out = typename ExpertShape<T>::Out;
  constexpr int kWide = ExpertShape<T>::kWide, kRows = ExpertShape<T>::kRows;
  const ExpertParams& f = p.f;
  const bool by_slot = span.expert >= 0, projects = p.dz.data != nullptr || p.dgates != nullptr;
  const int e0 = by_slot ? span.expert : 0, e1 = by_slot ? e0 + 1 : f.experts;
  const int begin = e0 * f.rank, end = e1 * f.rank;
  if (p.dgates != nullptr) {
    if (f.up_bias.data != nullptr) {
      form_dots<T>(m.dgates, m.tile, f.experts, p.dout, f.up_bias, f.outs, e0, e1);
    } else {
      for (int i = threadIdx.x; i < kRows * f.experts; i += kThreads) m.dgates[i] = 0.0f;
    }
    __syncthreads();
  }
#pragma unroll 1
  for (int c0 = begin; c0 < end; c0 += kWide) {
    const int last = c0 + kWide < end ? c0 + kWide : end;
    const bool live = by_slot || (m.tile->any & experts_between(c0, last, f.rank)) != 0;
    if (live && projects) project<T, false>(m, p.dout, f.up, f.outs, c0, end);
#pragma unroll 1
    for (int i = 0; i < Out::kPerThread; ++i) {
      const int row = Out::row(i), c = c0 + Out::col(i);
      const int64_t token = m.tile->token[row];
      const int valid = token >= 0 ? valid_columns(c, end, 8) : 0;
      float dot[8] = {};  // t act(z)
      if (valid > 0) {
        const uint64_t chosen = live ? m.tile->chosen[row] : 0;
        const float* const g = m.gates + row * f.experts;
        float t[8] = {}, z[8], ga[8], dz[8];
        if (live && projects) Out::template read<1>(t, m.stage, i);
        if (by_slot) {
          load8<T>(z, at<T>(f.z, span.first + row, c - begin), valid, f.z.vec);
        } else {
          load_bottleneck<T>(z, f, f.z, token, chosen, c, valid, f.shared);
        }
        each_expert(c, f.rank, [&](int e, int j) {
          const bool used = j < valid && has_bit(chosen, e);
          const float a = used ? activate(f.activation, z[j]) : 0.0f, gate = used ? g[e] : 0.0f;
          ga[j] = used ? gate * a : 0.0f;
          dz[j] = used ? f.mix * gate * t[j] * derivative(f.activation, z[j]) : 0.0f;
          dot[j] = used ? t[j] * a : 0.0f;
        });
        const int64_t at_row = by_slot ? span.first + row : token;
        const int at_col = by_slot ? c - begin : c;
        if (p.ga.data != nullptr) store8<T>(at_out<T>(p.ga, at_row, at_col), ga, valid, p.ga.vec);
        if (p.dz.data != nullptr) store8<T>(at_out<T>(p.dz, at_row, at_col), dz, valid, p.dz.vec);
      }
      if (live && p.dgates != nullptr)
        store8<float>(m.stage + row * (kWide + 8) + Out::col(i), dot, 8, true);
    }
    if (!live || p.dgates == nullptr) continue;
    __syncthreads();
    const int first = c0 / f.rank, count = (last - 1) / f.rank - first + 1;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * kRows; i += kThreads) {
      const int row = i % kRows, e = first + i / kRows;
      const int from = e * f.rank > c0 ? e * f.rank : c0,
                to = (e + 1) * f.rank < last ? (e + 1) * f.rank : last;
      float sum = 0.0f;
      for (int c = from; c < to; ++c) sum += m.stage[row * (kWide + 8) + c - c0];
      m.dgates[row * f.experts + e] += sum;
    }
  }
  if (p.dgates == nullptr) return;
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * (e1 - e0); i += kThreads) {
    const int row = i / (e1 - e0), e = e0 + i % (e1 - e0);
    if (has_bit(m.tile->chosen[row], e))
      p.dgates[m.tile->token[row] * f.experts + e] = f.mix * m.dgates[row * f.experts + e];
  }
}

// A row's dgates, and in their place the gradient of its logits where there are any.
__device__ __forceinline__ void form_dlogits(float* g, float* d, const ExpertRowsParams& p,
                                             int64_t token, uint64_t chosen) {
  const ExpertParams& f = p.f;
  const int64_t first = token * f.experts;
  const uint64_t all = ~uint64_t{0} >> (64 - f.experts);
  float inner = 0.0f;
#pragma unroll 1
  for (int e = 0; e < f.experts; ++e) {
    if (p.gates != nullptr) p.gates[first + e] = g[e];
    if (p.dgates == nullptr) continue;
    d[e] = has_bit(chosen, e) ? p.dgates[first + e] : 0.0f;
    inner += has_bit(chosen, e) ? g[e] * d[e] : 0.0f;
  }
  if (p.dgates == nullptr) return;
  if (f.logits != nullptr) {
    if (!f.renormalize) {
      for (int e = 0; e < f.experts; ++e) g[e] = f.logits[first + e];
      softmax(g, f.experts, all, all);
    }
#pragma unroll 1
    for (int e = 0; e < f.experts; ++e) {
      d[e] = g[e] * (d[e] - inner);
      if (p.dlogits != nullptr) d[e] += p.dlogits[first + e];
    }
  }
  for (int e = 0; e < f.experts; ++e) p.dgates[first + e] = d[e];
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    expert_dispatch_bwd_rows_kernel(const __grid_constant__ ExpertRowsParams p) {
  PETAL_SHARED(shared);
  const ExpertParams& f = p.f;
  const int inner = f.experts * f.rank;
  const ExpertMemory<T> m(shared, f.experts, inner);
  ExpertSpan span;
  if (!find_rows(span, m.tile, f, p.by_slot)) return;
  form_gates<T>(m, f, false);
  if (p.form_dz) form_dz<T>(m, p, span);
  if (!p.form_dx) return;
  __syncthreads();
  if (threadIdx.x < ExpertShape<T>::kRows && m.tile->token[threadIdx.x] >= 0) {
    const int row = threadIdx.x;
    form_dlogits(m.gates + row * f.experts, m.dgates + row * f.experts, p, m.tile->token[row],
                 m.tile->chosen[row]);
  }
  if (p.dx.data == nullptr) return;
  const bool routed = p.dgates != nullptr && f.logits != nullptr;
  const auto operand = [&](float (&v)[8], int row, int64_t token, int c, int valid) {
    load_bottleneck<T>(v, f, p.dz, token, m.tile->chosen[row], c, valid, false);
  };
  const auto finish = [&](float (&v)[8], int row, int64_t token, int64_t col, int valid,
                          int local) {
    if (routed) {
#pragma unroll 1
      for (int e = 0; e < f.experts; ++e)
        add_columns(v, m.columns + e * ExpertShape<T>::kWide + local,
                    m.dgates[row * f.experts + e]);
    }
    if (p.adds_dout) {
      float h[8];
      load8<T>(h, at<T>(p.dout, token, col), valid, p.dout.vec);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = f.keep * h[j] + v[j];
    }
    store8<T>(at_out<T>(p.dx, token, col), v, valid, p.dx.vec);
  };
  combine<T, false>(m, f.down, routed ? f.router : VectorView{}, f.experts, inner, f.width, operand,
                    finish);
}

}  // namespace

const char* launch_expert_dispatch_bwd_rows(const ExpertRowsParams& params, void* stream) {
  const ExpertParams& f = params.f;
  return dispatch_dtype(f.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kRows = ExpertShape<T>::kRows;
    const int64_t blocks =
        params.by_slot ? ceil_div(f.slots, kRows) + f.experts : ceil_div(f.rows, kRows);
    return launch(&expert_dispatch_bwd_rows_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                  ExpertMemory<T>::bytes(f.experts, f.experts * f.rank), stream, params);
  });
}

}  // namespace petal
