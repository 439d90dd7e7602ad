// From run-time dtypes and flags to template arguments.
#pragma once

#include <type_traits>

#include "common/dispatch.h"
#include "device.cuh"

namespace petal {

template <class Fn>
const char* dispatch_dtype(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::kFloat32: return fn(TypeTag<float>{});
    case DType::kFloat16: return fn(TypeTag<__half>{});
    case DType::kBFloat16: return fn(TypeTag<__nv_bfloat16>{});
  }
  return "unknown dtype";
}

template <class Fn>
const char* dispatch_bool(bool value, Fn fn) {
  return value ? fn(std::true_type{}) : fn(std::false_type{});
}

}  // namespace petal
