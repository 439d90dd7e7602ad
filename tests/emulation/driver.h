// What the drivers of the sanitizers share: matrices in heap blocks that end with their last
// element, so a read or write beyond it is reported, and comparisons with equality.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>

#include "cuda_emulation.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dispatch.h"
#include "common/philox.h"

namespace petal {

inline int failures = 0;

inline size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A [rows, cols] matrix in a block of exactly (rows - 1) * stride + cols elements.
struct Matrix {
  DType dtype;
  int64_t rows, cols, stride;
  std::unique_ptr<unsigned char, void (*)(void*)> memory;

  Matrix(DType dtype_, int64_t rows_, int64_t cols_, int64_t pad = 0)
      : dtype(dtype_), rows(rows_), cols(cols_), stride(cols_ + pad), memory(nullptr, std::free) {
    const size_t bytes = static_cast<size_t>((rows - 1) * stride + cols) * size_of(dtype);
    memory.reset(static_cast<unsigned char*>(std::malloc(bytes)));
    std::memset(memory.get(), 0xFF, bytes);
  }
  float get(int64_t r, int64_t c) const {
    const unsigned char* const p =
        memory.get() + static_cast<size_t>(r * stride + c) * size_of(dtype);
    float f;
    uint16_t bits;
    std::memcpy(&f, p, dtype == DType::kFloat32 ? 4 : 0);
    std::memcpy(&bits, p, 2);
    return dtype == DType::kFloat32   ? f
           : dtype == DType::kFloat16 ? __half2float({bits})
                                      : __bfloat162float({bits});
  }
  void set(int64_t r, int64_t c, float v) {
    unsigned char* const p = memory.get() + static_cast<size_t>(r * stride + c) * size_of(dtype);
    const uint16_t bits =
        dtype == DType::kFloat16 ? __float2half_rn(v).bits : __float2bfloat16_rn(v).bits;
    std::memcpy(p, dtype == DType::kFloat32 ? static_cast<const void*>(&v) : &bits, size_of(dtype));
  }
  void fill(unsigned salt) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c)
        set(r, c, static_cast<float>(static_cast<int64_t>((r * 7 + c * 3 + r * c + salt) % 3) - 1));
  }
  MatrixView view() const {
    MatrixView v;
    v.data = memory.get();
    v.stride = stride;
    v.vec = can_vectorise(v.data, stride, static_cast<int64_t>(size_of(dtype)));
    return v;
  }
};

inline void check(const char* error) {
  if (error == nullptr) return;
  std::printf("launch: %s\n", error);
  ++failures;
}

inline void expect(const std::string& what, const Matrix& got,
                   const std::function<double(int64_t, int64_t)>& want) {
  for (int64_t r = 0; r < got.rows; ++r)
    for (int64_t c = 0; c < got.cols; ++c) {
      // The expectation goes through the same rounding of one store.
      Matrix rounded(got.dtype, 1, 1);
      rounded.set(0, 0, static_cast<float>(want(r, c)));
      if (got.get(r, c) == rounded.get(0, 0)) continue;
      std::printf("%s: [%lld, %lld] is %g, want %g\n", what.c_str(), static_cast<long long>(r),
                  static_cast<long long>(c), got.get(r, c), rounded.get(0, 0));
      ++failures;
      return;
    }
}

constexpr int64_t kRng[2] = {0x123456789ABCDLL, 0xFFFFFFFFLL};
constexpr uint32_t kThreshold = 32768;  // p = 1/2: the factor 2 keeps integers

inline bool kept(uint32_t stream, int64_t row, int64_t col) {
  return (dropout_keep8(kRng[0], kRng[1], stream, row, col / 8, kThreshold) >> (col % 8)) & 1u;
}

inline Dropout dropout(bool on) {
  Dropout d;
  if (on) d = {kRng, kThreshold, 2.0f};
  return d;
}

}  // namespace petal
