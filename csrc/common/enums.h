// Enumerations that Python hands over by number, for both libraries and their kernels.
#pragma once

#include <stdint.h>

namespace petal {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// numerics.ACTIVATIONS.
enum class Activation : int32_t { kIdentity = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

// gated_bottleneck: its route and its gate.
enum class Route : int32_t { kNone = 0, kAdd = 1, kMul = 2, kProduct = 3 };
enum class Gate : int32_t { kNone = 0, kLarge = 1, kMiddleX = 2, kMiddleY = 3, kSmall = 4 };

// expert_dispatch.
enum class ExpertGate : int32_t { kMean = 0, kSoftmax = 1, kTopK = 2, kGiven = 3 };

}  // namespace petal
