// exp, sigmoid, erf and the activations on vectors, within about two units in the last place.
//
// NaN stays NaN and infinities give the limits: every clamp is a comparison that is false for NaN.
#pragma once

#include "isa.h"
#include "simd.h"

namespace petal {
namespace PETAL_ISA {

typedef int32_t vi __attribute__((vector_size(PETAL_VL * 4)));

// 2^n for -126 <= n <= 127.
PETAL_INLINE vf power_of_two(vi n) { return reinterpret_cast<vf>((n + 127) << 23); }

// e^x = 2^n e^r with |r| <= ln 2 / 2; ln 2 in two parts, the first exact when multiplied by n.
PETAL_INLINE vf exp_of(vf x) {
  const vf low = splat(-104.0f), high = splat(89.0f), shift = splat(12582912.0f);  // 1.5 * 2^23
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vf shifted = x * 1.44269504f + shift;
  const vf n = shifted - shift;
  const vf r = x - n * 0.693145751953125f - n * 1.42860677e-6f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // In two steps: subnormal results, and 2^128 before it becomes infinite.
  const vi whole = reinterpret_cast<vi>(shifted) - reinterpret_cast<vi>(shift), half = whole >> 1;
  return p * power_of_two(half) * power_of_two(whole - half);
}

PETAL_INLINE vf absolute(vf x) {
  return reinterpret_cast<vf>(reinterpret_cast<vu>(x) & 0x7fffffffu);
}

PETAL_INLINE vf sigmoid_of(vf x) { return 1.0f / (1.0f + exp_of(-x)); }

// s and s (1 - s), neither through a difference.
struct Sigmoid {
  vf value, slope;
};
PETAL_INLINE Sigmoid sigmoid_and_slope(vf x) {
  const vf e = exp_of(-absolute(x)), r = 1.0f / (1.0f + e);
  return {x < vf{} ? e * r : r, e * r * r};
}

PETAL_INLINE vf erf_of(vf x) {
  const vf t = absolute(x), s = x * x;
  vf far = t * -1.72853470e-5f + 3.83197126e-4f;
  far = far * s + (t * -3.88396438e-3f + 2.42546219e-2f);
  far = far * t - 1.06777877e-1f;
  far = far * t - 6.34846687e-1f;
  far = far * t - 1.28717512e-1f;
  far = far * t - t;
  far = 1.0f - exp_of(far);
  far = reinterpret_cast<vf>(reinterpret_cast<vu>(far) | (reinterpret_cast<vu>(x) & 0x80000000u));
  vf near = s * -5.96761703e-4f + 4.99119423e-3f;
  near = near * s - 2.67681349e-2f;
  near = near * s + 1.12819925e-1f;
  near = near * s - 3.76125336e-1f;
  near = near * s + 1.28379166e-1f;
  near = near * x + x;
  return t > splat(0.927734375f) ? far : near;
}

// gelu_tanh(q) = q sigmoid(2 k (q + c q^3)): the same function without 1 + tanh.
constexpr float kGeluSlope = 1.5957691216057308f, kGeluCube = 0.044715f;  // 2 sqrt(2 / pi)
PETAL_INLINE vf gelu_inner(vf q) { return q * (q * q * kGeluCube + 1.0f) * kGeluSlope; }

PETAL_INLINE vf activation(Activation name, vf q) {
  switch (name) {
    case Activation::kRelu: return q < vf{} ? vf{} : q;
    case Activation::kGelu: return q * 0.5f * (1.0f + erf_of(q * 0.70710678f));
    case Activation::kGeluTanh: return q * sigmoid_of(gelu_inner(q));
    case Activation::kSilu: return q * sigmoid_of(q);
    default: return q;
  }
}

PETAL_INLINE vf derivative(Activation name, vf q) {
  switch (name) {
    case Activation::kRelu: return q <= vf{} ? vf{} : splat(1.0f);
    case Activation::kGelu:
      return 0.5f + 0.5f * erf_of(q * 0.70710678f) + q * exp_of(q * q * -0.5f) * 0.39894228f;
    case Activation::kGeluTanh: {
      const Sigmoid s = sigmoid_and_slope(gelu_inner(q));
      return s.value + q * s.slope * (q * q * (3.0f * kGeluCube) + 1.0f) * kGeluSlope;
    }
    case Activation::kSilu: {
      const Sigmoid s = sigmoid_and_slope(q);
      return s.value + q * s.slope;
    }
    default: return splat(1.0f);
  }
}

// dst = activation(src), and dst *= derivative(src), on n floats, a multiple of kVL; the switch
// stands outside of the loop.
template <typename F>
PETAL_INLINE void by_activation(Activation name, const F& f) {
  switch (name) {
    case Activation::kIdentity: return f(Activation::kIdentity);
    case Activation::kRelu: return f(Activation::kRelu);
    case Activation::kGelu: return f(Activation::kGelu);
    case Activation::kGeluTanh: return f(Activation::kGeluTanh);
    case Activation::kSilu: return f(Activation::kSilu);
  }
}
inline void activate(float* dst, const float* src, int64_t n, Activation name) {
  by_activation(name, [=](Activation each) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; i += kVL) store(dst + i, activation(each, load(src + i)));
  });
}
inline void multiply_derivative(float* dst, const float* src, int64_t n, Activation name) {
  by_activation(name, [=](Activation each) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; i += kVL) {
      store(dst + i, load(dst + i) * derivative(each, load(src + i)));
    }
  });
}

}  // namespace PETAL_ISA
}  // namespace petal
