// Activations and their derivatives, in fp32.
#pragma once

#include "common/dispatch.h"
#include "device.cuh"

namespace petal {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

constexpr float kRootTwoOverPi = 0.7978845608028654f, kCubic = 0.044715f;

__device__ __forceinline__ float activate(Activation name, float q) {
  switch (name) {
    case Activation::kRelu: return q <= 0.0f ? 0.0f : q;  // NaN stays
    case Activation::kGelu: return 0.5f * q * (1.0f + erff(q * 0.70710678118654752f));
    case Activation::kGeluTanh:
      return 0.5f * q * (1.0f + tanhf(kRootTwoOverPi * (q + kCubic * q * q * q)));
    case Activation::kSilu: return q * sigmoid(q);
    default: return q;
  }
}

__device__ __forceinline__ float derivative(Activation name, float q) {
  switch (name) {
    case Activation::kRelu: return q <= 0.0f ? 0.0f : 1.0f;
    case Activation::kGelu:
      return 0.5f * (1.0f + erff(q * 0.70710678118654752f)) +
             q * 0.3989422804014327f * expf(-0.5f * q * q);
    case Activation::kGeluTanh: {
      const float t = tanhf(kRootTwoOverPi * (q + kCubic * q * q * q));
      return 0.5f * (1.0f + t) +
             0.5f * q * (1.0f - t * t) * kRootTwoOverPi * (1.0f + 3.0f * kCubic * q * q);
    }
    case Activation::kSilu: {
      const float s = sigmoid(q);
      return s * (1.0f + q * (1.0f - s));
    }
    default: return 1.0f;
  }
}

// fn(name), inlined once for each activation: asked once, not at every element.
template <class Fn>
__device__ __forceinline__ void by_activation(Activation name, Fn fn) {
  switch (name) {
    case Activation::kRelu: return fn(Activation::kRelu);
    case Activation::kGelu: return fn(Activation::kGelu);
    case Activation::kGeluTanh: return fn(Activation::kGeluTanh);
    case Activation::kSilu: return fn(Activation::kSilu);
    default: return fn(Activation::kIdentity);
  }
}

}  // namespace petal
