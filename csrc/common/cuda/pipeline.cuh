// The main loop of every product here: a ring of shared-memory stages filled by cp.async while the
// oldest one is multiplied.
#pragma once

#include "tile.cuh"

namespace petal {

constexpr int kStages = 3;

// Shared memory of a ring: an A and a B tile per stage, in elements of T.
template <typename T, int A_ELEMENTS, int B_ELEMENTS>
struct Ring {
  static constexpr int kElements = A_ELEMENTS + B_ELEMENTS;
  static constexpr size_t kBytes = sizeof(T) * kStages * kElements;
  T* base;
  __device__ __forceinline__ T* a(int64_t tile) const { return base + tile % kStages * kElements; }
  __device__ __forceinline__ T* b(int64_t tile) const { return a(tile) + A_ELEMENTS; }
};

// load(tile) starts the copies of a tile into its stage; prepare(tile) may write over the stage
// (masks, an activation) and says whether it did; use(tile) multiplies. Every thread of the block takes part; on return no copy is
// in flight, but other threads may still be reading the last stage.
template <class Load, class Prepare, class Use>
__device__ __forceinline__ void run_pipeline(int64_t tiles, Load load, Prepare prepare, Use use) {
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < tiles) load(static_cast<int64_t>(s));
    cp_async_commit();
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the tile is there for all, and all are done with the stage that the next
                      // load overwrites
    if (tile + kStages - 1 < tiles) load(tile + kStages - 1);
    cp_async_commit();
    if (prepare(tile)) __syncthreads();
    use(tile);
  }
  cp_async_wait<0>();
}

}  // namespace petal
