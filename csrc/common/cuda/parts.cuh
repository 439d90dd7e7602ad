// An fp32 intermediate as an operand of tensor cores: v = hi + lo with both halves in the 16-bit
// type, so that a product with it loses 2^-17 (bf16) or less in place of 2^-9 and the result is
// rounded once. In fp32 it is kept as it is.
#pragma once

#include "tile.cuh"

namespace petal {

constexpr int kPartTile = 64;  // blocks of 64 x 64

template <typename T>
constexpr int kParts = sizeof(T) == 2 ? 2 : 1;
template <typename T>
constexpr int kPartLd = kLd<T, kPartTile>;
template <typename T>
constexpr int kPartElements = kTileElements<T, kPartTile, kPartTile>;
template <typename T>
constexpr size_t kBlockBytes = sizeof(T) * kParts<T> * kPartElements<T>;

// block: [kParts][64][kPartLd] = the staged 64 x 64 tile.
template <typename T>
__device__ __forceinline__ void store_parts(T* block, const float* stage) {
  using In = Stage<kPartTile, kPartTile>;
#pragma unroll
  for (int i = 0; i < In::kPerThread; ++i) {
    float v[8];
    In::template read<1>(v, stage, i);
    T* const p = block + In::row(i) * kPartLd<T> + In::col(i);
    store8<T>(p, v, 8, true);
    if constexpr (kParts<T> == 2) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float hi = to_float(from_float<T>(v[j]));
        v[j] =
            fabsf(hi) <= 3.4028235e38f ? v[j] - hi : 0.0f;  // infinities and NaNs are in hi alone
      }
      store8<T>(p + kPartElements<T>, v, 8, true);
    }
  }
}

}  // namespace petal
