// What forward and backward of frozen_norm share: which row and columns a thread has, a row's sums,
// the weight.
#pragma once

#include "common/cuda/launchers.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vec.cuh"
#include "params.h"

namespace petal {

constexpr size_t kNormShared = sizeof(float) * (kThreads / kWarp);

// kLanes threads have a row, eight columns each at a time: a warp or the block.
template <int kLanes>
struct Row {
  static constexpr int64_t kStep = 8 * kLanes;
  int64_t index, first;

  __device__ __forceinline__ Row()
      : index(static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes),
        first(threadIdx.x % kLanes * 8) {}

  // The sum over the row, in every thread of it.
  __device__ __forceinline__ float sum(float v) const {
    v = warp_sum(v);
    if (kLanes == kWarp) return v;
    PETAL_SHARED(shared);
    float* const sums = reinterpret_cast<float*>(shared);
    __syncthreads();  // nobody reads the last sums any more
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = v;
    __syncthreads();
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

// What eight normalised columns are multiplied by.
template <typename T>
__device__ __forceinline__ void load_factor(float (&v)[8], const NormParams& p, int64_t col,
                                            int valid) {
  if (p.weight.data == nullptr) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = 1.0f;
    return;
  }
  load8<T>(v, static_cast<const T*>(p.weight.data) + col, valid, p.weight.vec);
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] += p.offset;
}

template <class Fn>
const char* launch_rows(const NormParams& p, Fn fn) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    return dispatch_bool(p.width <= kNormWarpColumns, [&](auto narrow) {
      constexpr int kLanes = decltype(narrow)::value ? kWarp : kThreads;
      const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, kThreads / kLanes)));
      return fn(tag, std::integral_constant<int, kLanes>{}, grid);
    });
  });
}

}  // namespace petal
