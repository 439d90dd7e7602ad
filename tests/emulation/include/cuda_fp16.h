// __half for the emulation: storage plus conversions that round to nearest even, bit for bit as the
// hardware's.
#pragma once

#include <cstdint>
#include <cstring>

struct alignas(2) __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  uint32_t exponent = (h.bits >> 10) & 31u, mantissa = h.bits & 0x3FFu, bits;
  if (exponent == 31u) {
    bits = sign | 0x7F800000u | (mantissa << 13);
  } else if (exponent != 0u) {
    bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
  } else if (mantissa == 0u) {
    bits = sign;
  } else {
    exponent = 113u;
    while (!(mantissa & 0x400u)) {
      mantissa <<= 1;
      --exponent;
    }
    bits = sign | (exponent << 23) | ((mantissa & 0x3FFu) << 13);
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline __half __float2half_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7FFFFFFFu;
  __half h;
  if (bits > 0x7F800000u) {
    h.bits = 0x7FFFu;  // the hardware's canonical NaN
  } else if (bits >= 0x477FF000u) {
    h.bits = static_cast<uint16_t>(sign | 0x7C00u);  // rounds to 2^16 or beyond
  } else if (bits >= 0x38800000u) {
    bits += 0xFFFu + ((bits >> 13) & 1u);
    h.bits = static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
  } else {
    // Subnormal: adding 0.5 aligns the units of 2^-24 with the last mantissa bit and rounds in the
    // floating-point unit.
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    h.bits = static_cast<uint16_t>(sign | (bits - 0x3F000000u));
  }
  return h;
}
