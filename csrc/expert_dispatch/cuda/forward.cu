// expert_dispatch, forward. Legend: N tokens, E experts, r rank of each, D input width, O output
// width, S slots; H is base or x, l the logits, g the gates, _e an expert's; every other name is an
// argument's; T = fp32, fp16, bf16.
//
//   l   = x router^T + router_bias + noise, the choice of the k largest, g: softmax over the chosen
//         (or over all, kept at the chosen) | 1 / E | given per token or per sample
//   z_e = x down_e^T + down_bias_e            rounded to T and stored
//   out = keep H + mix sum_e g_e (act(z_e) up_e^T + up_bias_e)
//
// Shapes   row matrices with any row stride; weights [E r, D] and [O, E r] in T; vectors in T or
//          fp32; 16-byte copies where address and row stride allow. No size is a multiple of
//          anything.
// Grid     stationary: blocks of 32 tokens: logits and gates, z of the experts that one of them
//          chose, then the output in tiles of 64 columns, the contraction running over those
//          experts. sorted: the same blocks for the logits; after the sort blocks of 32 slots of
//          one expert for z (the rows of x gathered, an upper bound of ceil(S / 32) + E of them);
//          blocks of tokens for the output, z found through the inverse of the order.
// Traffic  stationary: x and H from DRAM once (x comes again from L2 for each 64 columns of z), z,
//          logits and out written once: 2 N D + N E r for H = x. sorted: x for the logits and k
//          times by slots, z written and read once, H read and out written once. Weights from L2
//          per block.
// Numerics fp32 accumulators, gates and epilogue, IEEE products in fp32; logits in fp32 whatever T.
//          Rounded to T: z, ga = g act(z), out. What an expert that was not chosen would have added
//          is left out, not multiplied by 0.
// Limits   r <= 256, E <= 64. Every sum has a fixed order: same bits on every run.
// Source   ops/expert_dispatch/reference.py.
#include "gates.cuh"

namespace petal {
namespace {

// z of the block's rows: of every expert that one of them chose, or of the expert of its slots.
template <typename T>
__device__ __forceinline__ void form_z(const ExpertMemory<T>& m, const ExpertParams& p,
                                       const ExpertSpan& span) {
  using Out = typename ExpertShape<T>::Out;
  constexpr int kWide = ExpertShape<T>::kWide;
  const bool by_slot = span.expert >= 0;
  const int begin = by_slot && !p.shared ? span.expert * p.rank : 0;
  const int end = by_slot || p.shared ? begin + p.rank : p.experts * p.rank;
#pragma unroll 1
  for (int c0 = begin; c0 < end; c0 += kWide) {
    const int last = c0 + kWide < end ? c0 + kWide : end;
    if (!by_slot && !p.shared && !(m.tile->any & experts_between(c0, last, p.rank))) continue;
    project<T, true>(m, p.x, p.down, p.width, c0, end);
#pragma unroll 1
    for (int i = 0; i < Out::kPerThread; ++i) {
      const int row = Out::row(i), c = c0 + Out::col(i);
      const int64_t token = m.tile->token[row];
      const int valid = token >= 0 ? valid_columns(c, end, 8) : 0;
      if (valid == 0) continue;
      float v[8], bias[8];
      Out::template read<1>(v, m.stage, i);
      if (p.down_bias.data != nullptr) {
        load_vector<T>(bias, p.down_bias, c, valid);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] += bias[j];
      }
      T* const target =
          by_slot ? at_out<T>(p.z, span.first + row, c - begin) : at_out<T>(p.z, token, c);
      store8<T>(target, v, valid, p.z.vec);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    expert_dispatch_fwd_kernel(const __grid_constant__ ExpertFwdParams p) {
  PETAL_SHARED(shared);
  const ExpertParams& f = p.f;
  const int inner = f.experts * f.rank;
  const ExpertMemory<T> m(shared, f.experts, inner);
  ExpertSpan span;
  if (!find_rows(span, m.tile, f, p.by_slot)) return;
  if (p.by_slot) {
    __syncthreads();
  } else {
    form_gates<T>(m, f, p.form_logits);
  }
  if (p.form_z) form_z<T>(m, f, span);
  if (p.out.data == nullptr) return;
  const auto operand = [&](float (&v)[8], int row, int64_t token, int c, int valid) {
    const uint64_t chosen = m.tile->chosen[row];
    const float* const g = m.gates + row * f.experts;
    load_bottleneck<T>(v, f, f.z, token, chosen, c, valid, f.shared);
    each_expert(c, f.rank, [&](int e, int j) {
      v[j] = j < valid && has_bit(chosen, e) ? g[e] * activate(f.activation, v[j]) : 0.0f;
    });
  };
  const auto finish = [&](float (&v)[8], int row, int64_t token, int64_t col, int valid,
                          int local) {
    if (f.up_bias.data != nullptr) {
#pragma unroll 1
      for (int e = 0; e < f.experts; ++e) {
        if (has_bit(m.tile->chosen[row], e))
          add_columns(v, m.columns + e * ExpertShape<T>::kWide + local,
                      m.gates[row * f.experts + e]);
      }
    }
    float h[8] = {};
    if (p.h.data != nullptr) load8<T>(h, at<T>(p.h, token, col), valid, p.h.vec);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      v[j] = p.h.data != nullptr ? f.keep * h[j] + f.mix * v[j] : f.mix * v[j];
    store8<T>(at_out<T>(p.out, token, col), v, valid, p.out.vec);
  };
  combine<T, true>(m, f.up, f.up_bias, f.experts, inner, f.outs, operand, finish);
}

}  // namespace

const char* launch_expert_dispatch_fwd(const ExpertFwdParams& params, void* stream) {
  const ExpertParams& f = params.f;
  return dispatch_dtype(f.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kRows = ExpertShape<T>::kRows;
    const int64_t blocks =
        params.by_slot ? ceil_div(f.slots, kRows) + f.experts : ceil_div(f.rows, kRows);
    return launch(&expert_dispatch_fwd_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                  ExpertMemory<T>::bytes(f.experts, f.experts * f.rank), stream, params);
  });
}

size_t expert_dispatch_fwd_bytes(DType dtype, int experts, int rank) {
  size_t bytes = 0;
  dispatch_dtype(dtype, [&](auto tag) {
    bytes = ExpertMemory<typename decltype(tag)::type>::bytes(experts, experts * rank);
    return static_cast<const char*>(nullptr);
  });
  return bytes;
}

}  // namespace petal
