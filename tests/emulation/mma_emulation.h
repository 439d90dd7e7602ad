// The warp instructions of csrc/common/cuda/mma.cuh for the emulation: every lane deposits its
// registers, then computes its own outputs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_emulation.h"

namespace petal {

inline void cp_async_16(void* shared, const void* global, int bytes) {
  ::petal_emulation::async_copy(shared, global, bytes);
}
inline void cp_async_commit() { ::petal_emulation::async_commit(); }
template <int PENDING>
inline void cp_async_wait() {
  ::petal_emulation::async_wait(PENDING);
}

// Lane l names the 16 bytes of row l % 8 of matrix l / 8. Register i of lane l is elements 2 (l %
// 4), + 1 of row l / 4 of matrix i ...
inline void ldmatrix_x4(uint32_t (&r)[4], const void* p) {
  uint32_t* const rows = static_cast<uint32_t*>(::petal_emulation::warp_scratch());
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(rows + lane * 4, p, 16);
  ::petal_emulation::warp_barrier();
  for (unsigned i = 0; i < 4; ++i) r[i] = rows[(i * 8 + lane / 4) * 4 + lane % 4];
}

// ... and, transposed, elements l / 4 of rows 2 (l % 4) and + 1.
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) {
  uint16_t* const rows = static_cast<uint16_t*>(::petal_emulation::warp_scratch());
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(rows + lane * 8, p, 16);
  ::petal_emulation::warp_barrier();
  for (unsigned i = 0; i < 4; ++i) {
    const uint16_t* const first = rows + (i * 8 + lane % 4 * 2) * 8 + lane / 4;
    r[i] = first[0] | static_cast<uint32_t>(first[8]) << 16;
  }
}

inline float to_float_emulated(__half v) { return __half2float(v); }
inline float to_float_emulated(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T>
inline float element_from_bits(uint32_t bits) {
  const uint16_t half = static_cast<uint16_t>(bits);
  T value;
  std::memcpy(&value, &half, 2);
  return to_float_emulated(value);
}

template <typename T>
inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float* const fa = static_cast<float*>(::petal_emulation::warp_scratch());  // [16][16]
  float* const fb = fa + 256;                                                // [8][16], transposed
  const unsigned lane = threadIdx.x % 32, row = lane / 4, col = lane % 4 * 2;
  for (unsigned half = 0; half < 2; ++half) {
    for (unsigned i = 0; i < 4; ++i)
      fa[(row + i % 2 * 8) * 16 + col + i / 2 * 8 + half] =
          element_from_bits<T>(a[i] >> (16 * half));
    fb[row * 16 + col + half] = element_from_bits<T>(b0 >> (16 * half));
    fb[row * 16 + col + 8 + half] = element_from_bits<T>(b1 >> (16 * half));
  }
  ::petal_emulation::warp_barrier();
  for (unsigned i = 0; i < 4; ++i) {
    const float *x = fa + (row + i / 2 * 8) * 16, *y = fb + (col + i % 2) * 16;
    float sum = 0.0f;
    for (unsigned k = 0; k < 16; ++k) sum += x[k] * y[k];
    c[i] += sum;
  }
}

}  // namespace petal
