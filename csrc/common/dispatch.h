// Plain C++ seen by launchers (.cu) and the host side (.cpp): tensor views and dropout of a CUDA
// kernel's call, divisions that round up.
#pragma once

#include <cstdint>

#include "enums.h"

namespace petal {

template <typename T>
struct TypeTag {
  using type = T;
};

// A row-major matrix: unit stride along columns, `stride` elements from row to row. `vec` says that
// 16-byte accesses at columns that are multiples of 16 bytes are legal (address and row stride are
// multiples of 16 bytes).
struct MatrixView {
  void* data = nullptr;
  int64_t stride = 0;
  bool vec = false;
};

// A small tensor with any stride, in T or (wide) fp32.
struct VectorView {
  const void* data = nullptr;
  int64_t stride = 0;
  bool wide = false;
};

inline bool can_vectorise(const void* data, int64_t stride, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_size % 16 == 0;
}

// rng: device address of (seed, offset), nullptr when dropout is off. scale: the factor of the kept
// values.
struct Dropout {
  const int64_t* rng = nullptr;
  uint32_t threshold = 0;
  float scale = 1.0f;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace petal
