// expert_dispatch: the router. Logits, choice and gates of a block's tokens, in fp32.
#pragma once

#include "block.cuh"

namespace petal {

// dots[row, e] = in[token of row] . weights[e] for experts [first, end), in fp32: eight rows per
// warp, four experts at a time.
template <typename T>
__device__ __forceinline__ void form_dots(float* dots, const ExpertTile* tile, int experts,
                                          const MatrixView& in, const VectorView& weights,
                                          int64_t width, int first, int end) {
  constexpr int kMine = 32 / (kThreads / kWarp), kMany = 4;
  const int lane = threadIdx.x % kWarp, row0 = threadIdx.x / kWarp * kMine;
#pragma unroll 1
  for (int e0 = first; e0 < end; e0 += kMany) {
    float sum[kMine][kMany] = {};
#pragma unroll 1
    for (int64_t col = lane * 8; col < width; col += kWarp * 8) {
      const int valid = valid_columns(col, width, 8);
      float w[kMany][8];
#pragma unroll
      for (int e = 0; e < kMany; ++e)
        load_vector<T>(w[e], weights, (e0 + e < end ? e0 + e : e0) * width + col, valid);
#pragma unroll
      for (int r = 0; r < kMine; ++r) {
        const int64_t token = tile->token[row0 + r];
        if (token < 0) continue;
        float v[8];
        load8<T>(v, at<T>(in, token, col), valid, in.vec);
#pragma unroll
        for (int e = 0; e < kMany; ++e)
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[r][e] += w[e][j] * v[j];
      }
    }
#pragma unroll
    for (int r = 0; r < kMine; ++r)
#pragma unroll
      for (int e = 0; e < kMany; ++e) {
        const float dot = warp_sum(sum[r][e]);
        if (lane == 0 && e0 + e < end) dots[(row0 + r) * experts + e0 + e] = dot;
      }
  }
}

// The k largest of a row; of equal ones the first, NaN above everything.
__device__ __forceinline__ uint64_t choose(const float* logits, int experts, int k) {
  uint64_t chosen = 0;
#pragma unroll 1
  for (int i = 0; i < k; ++i) {
    int best = -1;
#pragma unroll 1
    for (int e = 0; e < experts; ++e) {
      if (has_bit(chosen, e)) continue;
      const float l = logits[e], m = best < 0 ? 0.0f : logits[best];
      if (best < 0 || l > m || (l != l && m == m)) best = e;
    }
    chosen |= uint64_t{1} << best;
  }
  return chosen;
}

// In place of the logits: the softmax over the experts of `over`, 0 where one is not in `kept`.
__device__ __forceinline__ void softmax(float* v, int experts, uint64_t over, uint64_t kept) {
  float top = -INFINITY, sum = 0.0f;
#pragma unroll 1
  for (int e = 0; e < experts; ++e) {
    if (has_bit(over, e)) top = fmaxf(top, v[e]);
  }
#pragma unroll 1
  for (int e = 0; e < experts; ++e) {
    v[e] = has_bit(over, e) ? expf(v[e] - top) : 0.0f;
    sum += v[e];
  }
#pragma unroll 1
  for (int e = 0; e < experts; ++e) v[e] = has_bit(kept, e) ? v[e] / sum : 0.0f;
}

// A row's gates and choice, in place of its dots with the router where the logits are formed.
template <typename T>
__device__ __forceinline__ uint64_t row_gates(float* g, const ExpertParams& p, int64_t token,
                                              bool form_logits) {
  const uint64_t all = ~uint64_t{0} >> (64 - p.experts);
  if (token < 0) {
    for (int e = 0; e < p.experts; ++e) g[e] = 0.0f;
    return 0;
  }
  const int64_t row = token / p.tokens_per_gate * p.experts;
  const bool routed = p.gate == ExpertGate::kSoftmax || p.gate == ExpertGate::kTopK;
#pragma unroll 1
  for (int e = 0; e < p.experts; ++e) {
    if (form_logits) {
      float l = g[e];
      if (p.router_bias.data != nullptr) l += element<T>(p.router_bias, e);
      if (p.noise.data != nullptr) l += element<T>(p.noise, row + e);
      p.logits[row + e] = g[e] = l;
    } else {
      g[e] = routed                         ? p.logits[row + e]
             : p.gate == ExpertGate::kGiven ? element<T>(p.gates, row + e)
                                            : 1.0f / static_cast<float>(p.experts);
    }
  }
  uint64_t chosen = all;
  if (form_logits && p.gate == ExpertGate::kTopK) {
    chosen = choose(g, p.experts, p.top_k);
    for (int e = 0; e < p.experts; ++e) p.chosen[row + e] = has_bit(chosen, e);
  } else if (p.chosen != nullptr) {
    chosen = 0;
    for (int e = 0; e < p.experts; ++e)
      chosen |= static_cast<uint64_t>(p.chosen[row + e] != 0) << e;
  }
  if (routed) {
    softmax(g, p.experts, p.renormalize ? chosen : all, chosen);
  } else {
    for (int e = 0; e < p.experts; ++e) g[e] = has_bit(chosen, e) ? g[e] : 0.0f;
  }
  return chosen;
}

// Gates and choices of the block's tokens, and which pieces of the bottlenecks anyone chose.
template <typename T>
__device__ __forceinline__ void form_gates(const ExpertMemory<T>& m, const ExpertParams& p,
                                           bool form_logits) {
  constexpr int kD = ExpertShape<T>::kD;
  __syncthreads();
  if (form_logits) form_dots<T>(m.gates, m.tile, p.experts, p.x, p.router, p.width, 0, p.experts);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const int row = threadIdx.x;
    uint64_t any = row_gates<T>(m.gates + row * p.experts, p, m.tile->token[row], form_logits);
    m.tile->chosen[row] = any;
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) any |= __shfl_xor_sync(0xFFFFFFFFu, any, mask);
    if (row == 0) {
      const int inner = p.experts * p.rank;
      int count = 0;
      for (int c = 0; c < inner; c += kD) {
        if (any & experts_between(c, c + kD < inner ? c + kD : inner, p.rank))
          m.piece[count++] = c / kD;
      }
      if (count == 0) m.piece[count++] = 0;  // an operand of zeros
      m.tile->any = any;
      m.tile->pieces = count;
    }
  }
  __syncthreads();
}

}  // namespace petal
