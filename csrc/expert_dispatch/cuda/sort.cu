// expert_dispatch: tokens by expert, a stable counting sort on the device. Legend: N tokens, E
// experts, S the number of (token, expert) pairs chosen, at most `slots`.
//
// Maths    slot(n, e) = offsets[e] + the number of tokens before n that chose e.
//
//   order    [slots]  the tokens of expert 0 ascending, then those of expert 1, ..., then -1
//   offsets  [E + 1]  where each expert's slots begin, and the end
//   inverse  [N, E]   the slot of a token and an expert that it chose; else not written
//
// Shapes   chosen: bool [N, E], or one row per `tokens_per_gate` tokens; contiguous.
// Grid     count: a block of four warps counts 1024 tokens by ballots. scan: one block, a thread
//          per expert. place: the blocks of count again; a warp knows where its 256 tokens of an
//          expert begin and ranks them by ballot, so the order is the tokens' own. invert: a thread
//          per slot (backward, where only the order was kept).
// Traffic  chosen twice, order and inverse once; counts [N / 1024, E].
// Numerics integers: exact.
// Limits   E <= 64. No atomics: same bits on every run.
// Source   ops/expert_dispatch/routing.py, sort_by_expert.
#include "common/cuda/device.cuh"
#include "params.h"

namespace petal {
namespace {

constexpr int kWarps = kThreads / kWarp, kRounds = kSortTokens / kThreads;

// Tokens of `round` of this warp that chose e, a bit per lane.
__device__ __forceinline__ uint32_t ballot(const ExpertSortParams& p, int e, int round,
                                           int64_t& token) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  token = static_cast<int64_t>(blockIdx.x) * kSortTokens + (warp * kRounds + round) * kWarp + lane;
  const bool hit = token < p.rows && p.chosen[token / p.tokens_per_gate * p.experts + e] != 0;
  return __ballot_sync(0xFFFFFFFFu, hit);
}

// counts[warp, e] of the block's tokens.
__device__ __forceinline__ void count_warps(int* counts, const ExpertSortParams& p) {
  for (int e = 0; e < p.experts; ++e) {
    int count = 0;
    int64_t token;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) count += __popc(ballot(p, e, round, token));
    if (threadIdx.x % kWarp == 0) counts[threadIdx.x / kWarp * p.experts + e] = count;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads)
    expert_dispatch_fwd_sort_count_kernel(const __grid_constant__ ExpertSortParams p) {
  PETAL_SHARED(shared);
  int* const counts = reinterpret_cast<int*>(shared);
  count_warps(counts, p);
  const int e = threadIdx.x;
  if (e >= p.experts) return;
  int count = 0;
  for (int warp = 0; warp < kWarps; ++warp) count += counts[warp * p.experts + e];
  p.counts[static_cast<int64_t>(blockIdx.x) * p.experts + e] = count;
}

// counts become the first slots of their blocks.
__global__ void __launch_bounds__(kThreads)
    expert_dispatch_fwd_sort_scan_kernel(const __grid_constant__ ExpertSortParams p) {
  PETAL_SHARED(shared);
  int* const totals = reinterpret_cast<int*>(shared);
  const int e = threadIdx.x;
  const int64_t blocks = (p.rows + kSortTokens - 1) / kSortTokens;
  if (e < p.experts) {
    int total = 0;
#pragma unroll 8
    for (int64_t b = 0; b < blocks; ++b) total += p.counts[b * p.experts + e];
    totals[e] = total;
  }
  __syncthreads();
  if (e > p.experts) return;
  int slot = 0;
  for (int i = 0; i < e; ++i) slot += totals[i];
  p.offsets[e] = slot;
  if (e == p.experts) return;
#pragma unroll 8
  for (int64_t b = 0; b < blocks; ++b) {
    const int count = p.counts[b * p.experts + e];
    p.counts[b * p.experts + e] = slot;
    slot += count;
  }
}

__global__ void __launch_bounds__(kThreads)
    expert_dispatch_fwd_sort_place_kernel(const __grid_constant__ ExpertSortParams p) {
  PETAL_SHARED(shared);
  int* const counts = reinterpret_cast<int*>(shared);
  count_warps(counts, p);
  const uint32_t before = (1u << threadIdx.x % kWarp) - 1u;
  for (int e = 0; e < p.experts; ++e) {
    int slot = p.counts[static_cast<int64_t>(blockIdx.x) * p.experts + e];
    for (int warp = 0; warp < static_cast<int>(threadIdx.x) / kWarp; ++warp)
      slot += counts[warp * p.experts + e];
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      int64_t token;
      const uint32_t hits = ballot(p, e, round, token);
      if (hits >> threadIdx.x % kWarp & 1u) {
        const int mine = slot + __popc(hits & before);
        p.order[mine] = static_cast<int32_t>(token);
        p.inverse[token * p.experts + e] = mine;
      }
      slot += __popc(hits);
    }
  }
  const int64_t end = p.offsets[p.experts];
  for (int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; slot < p.slots;
       slot += static_cast<int64_t>(gridDim.x) * kThreads) {
    if (slot >= end) p.order[slot] = -1;
  }
}

__global__ void __launch_bounds__(kThreads)
    expert_dispatch_bwd_invert_kernel(const __grid_constant__ ExpertSortParams p) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (slot >= p.offsets[p.experts]) return;
  int e = 0;
  while (slot >= p.offsets[e + 1]) ++e;
  p.inverse[p.order[slot] * static_cast<int64_t>(p.experts) + e] = static_cast<int32_t>(slot);
}

}  // namespace

const char* launch_expert_dispatch_fwd_sort(const ExpertSortParams& params, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(params.rows, kSortTokens)));
  const size_t bytes = sizeof(int) * kWarps * params.experts;
  const char* error = launch(&expert_dispatch_fwd_sort_count_kernel, grid, bytes, stream, params);
  if (error == nullptr)
    error = launch(&expert_dispatch_fwd_sort_scan_kernel, dim3(1), bytes, stream, params);
  return error != nullptr
             ? error
             : launch(&expert_dispatch_fwd_sort_place_kernel, grid, bytes, stream, params);
}

const char* launch_expert_dispatch_bwd_invert(const ExpertSortParams& params, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(params.slots, kThreads)));
  return launch(&expert_dispatch_bwd_invert_kernel, grid, 0, stream, params);
}

}  // namespace petal
