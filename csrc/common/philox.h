// The counter-based generator of petal_kernels/_runtime/philox.py in plain C++: the same file
// serves g++ and nvcc.
//
//   key     = (seed low, seed high)
//   counter = (row low, row high, column / 8, (offset + stream) low)
//   Philox4x32 with 7 rounds gives four words; word[j / 2] >> (16 * (j % 2)) is lane j, which
//   decides column 8 * (column / 8) + j: keep iff lane >= threshold; kept values are multiplied by
//   65536 / (65536 - threshold), so the expectation is exact.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PETAL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PETAL_HOST_DEVICE inline
#endif

namespace petal {

constexpr int kDropoutGroup = 8;  // columns served by one call of the generator

PETAL_HOST_DEVICE void philox4x32_7(uint32_t key0, uint32_t key1, uint32_t c0, uint32_t c1,
                                    uint32_t c2, uint32_t c3, uint32_t out[4]) {
  constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u, kKey0 = 0x9E3779B9u,
                     kKey1 = 0xBB67AE85u;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 7; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kMul0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kMul1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    key0 += kKey0;
    key1 += kKey1;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// Bit j of the result says whether column 8 * group + j of `row` is kept. seed and offset are
// rng[0] and rng[1].
PETAL_HOST_DEVICE uint32_t dropout_keep8(int64_t seed, int64_t offset, uint32_t stream, int64_t row,
                                         int64_t group, uint32_t threshold) {
  const uint64_t seed_bits = static_cast<uint64_t>(seed), row_bits = static_cast<uint64_t>(row);
  uint32_t words[4];
  philox4x32_7(static_cast<uint32_t>(seed_bits), static_cast<uint32_t>(seed_bits >> 32),
               static_cast<uint32_t>(row_bits), static_cast<uint32_t>(row_bits >> 32),
               static_cast<uint32_t>(group),
               static_cast<uint32_t>(static_cast<uint64_t>(offset)) + stream, words);
  uint32_t keep = 0;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int word = 0; word < 4; ++word) {
    keep |= static_cast<uint32_t>((words[word] & 0xFFFFu) >= threshold) << (2 * word);
    keep |= static_cast<uint32_t>((words[word] >> 16) >= threshold) << (2 * word + 1);
  }
  return keep;
}

// Host side: the integer threshold of probability p in [0, 1) (round half to even, as Python's
// round) ...
inline uint32_t dropout_threshold(double p) {
  const double rounded = std::nearbyint(p * 65536.0);
  return rounded <= 0.0 ? 0u : rounded >= 65535.0 ? 65535u : static_cast<uint32_t>(rounded);
}

// ... and the factor of the kept values, rounded once to fp32.
inline float dropout_scale(uint32_t threshold) {
  return static_cast<float>(65536.0 / (65536.0 - threshold));
}

}  // namespace petal
