// Element types and 8-wide accesses: conversion to and from fp32 (round to nearest even), one
// 8-column group per call.
#pragma once

#include "common/dispatch.h"
#include "device.cuh"

namespace petal {

template <typename T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));  // elements of one 16-byte access

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <typename T>
struct alignas(16) Pack {
  T e[kVec<T>];
};

// Eight consecutive elements as fp32; the ones from `valid` on read as zero and are not touched.
template <typename T>
__device__ __forceinline__ void load8(float (&v)[8], const T* p, int valid, bool vec) {
  if (vec && valid == 8) {
#pragma unroll
    for (int i = 0; i < 8; i += kVec<T>) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(p + i);
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) v[i + j] = to_float(pack.e[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = i < valid ? to_float(p[i]) : 0.0f;
  }
}

template <typename T>
__device__ __forceinline__ void store8(T* p, const float (&v)[8], int valid, bool vec) {
  if (vec && valid == 8) {
#pragma unroll
    for (int i = 0; i < 8; i += kVec<T>) {
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) pack.e[j] = from_float<T>(v[i + j]);
      *reinterpret_cast<Pack<T>*>(p + i) = pack;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < valid) p[i] = from_float<T>(v[i]);
    }
  }
}

// Accesses whose dtype is known at run time only.
__device__ __forceinline__ void store_as(void* data, DType dtype, int64_t index, float v) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = v;
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(data)[index] = from_float<__half>(v);
  } else {
    static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(v);
  }
}

__device__ __forceinline__ void store8_as(void* data, DType dtype, int64_t index,
                                          const float (&v)[8], int valid, bool vec) {
  if (dtype == DType::kFloat32) {
    store8<float>(static_cast<float*>(data) + index, v, valid, vec);
  } else if (dtype == DType::kFloat16) {
    store8<__half>(static_cast<__half*>(data) + index, v, valid, vec);
  } else {
    store8<__nv_bfloat16>(static_cast<__nv_bfloat16*>(data) + index, v, valid, vec);
  }
}

__device__ __forceinline__ void load8_as(float (&v)[8], const void* data, DType dtype,
                                         int64_t index, int valid, bool vec) {
  if (dtype == DType::kFloat32) {
    load8<float>(v, static_cast<const float*>(data) + index, valid, vec);
  } else if (dtype == DType::kFloat16) {
    load8<__half>(v, static_cast<const __half*>(data) + index, valid, vec);
  } else {
    load8<__nv_bfloat16>(v, static_cast<const __nv_bfloat16*>(data) + index, valid, vec);
  }
}

// How many of `width` columns a group starting at `col` holds, at most `most`.
__device__ __forceinline__ int valid_columns(int64_t col, int64_t width, int most) {
  const int64_t left = width - col;
  return left >= most ? most : (left > 0 ? static_cast<int>(left) : 0);
}

template <typename T>
__device__ __forceinline__ float element(const VectorView& v, int64_t i) {
  return v.wide ? static_cast<const float*>(v.data)[i * v.stride]
                : to_float(static_cast<const T*>(v.data)[i * v.stride]);
}

template <typename T>
__device__ __forceinline__ const T* at(const MatrixView& m, int64_t row, int64_t col) {
  return static_cast<const T*>(m.data) + row * m.stride + col;
}
template <typename T>
__device__ __forceinline__ T* at_out(const MatrixView& m, int64_t row, int64_t col) {
  return static_cast<T*>(m.data) + row * m.stride + col;
}

}  // namespace petal
