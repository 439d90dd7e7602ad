// Vectors for the CPU kernels: one spelling for every instruction set.
//
// The kernels are written with the compiler's vector extension, so that the same source serves SSE2
// or NEON (4 floats), AVX2 (8) and AVX-512 (16). Everything lives in a namespace named after the
// instruction set (PETAL_ISA): the objects are linked into one library, and an inline function that
// two of them shared by name could be taken from the wrong one by the linker. For the same reason
// no C++ standard header is included here.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef PETAL_ISA
#define PETAL_ISA generic
#endif

#ifndef PETAL_VL
#if defined(__AVX512F__)
#define PETAL_VL 16
#elif defined(__AVX2__)
#define PETAL_VL 8
#else
#define PETAL_VL 4
#endif
#endif

#define PETAL_INLINE inline __attribute__((always_inline))

namespace petal {
namespace PETAL_ISA {

constexpr int kVL = PETAL_VL;            // floats in a vector
constexpr int kNR = 2 * kVL;             // columns of a register tile, width of a packed panel
constexpr int kMR = kVL == 16 ? 12 : 6;  // rows of a register tile: kMR * 2 accumulators + 3

typedef float vf __attribute__((vector_size(PETAL_VL * 4)));
typedef uint32_t vu __attribute__((vector_size(PETAL_VL * 4)));
typedef uint16_t vh __attribute__((vector_size(PETAL_VL * 2)));
typedef float vf_mem __attribute__((vector_size(PETAL_VL * 4), aligned(4), may_alias));
typedef uint16_t vh_mem __attribute__((vector_size(PETAL_VL * 2), aligned(2), may_alias));

// Storage types: the bits only, so that no torch header is needed here.
struct bf16_t {
  uint16_t bits;
};
struct fp16_t {
  uint16_t bits;
};

PETAL_INLINE vf splat(float v) { return v - vf{}; }  // v - 0 is v for every v, v + 0 is not

PETAL_INLINE float half_to_float(uint16_t h) {
  const uint32_t shifted = static_cast<uint32_t>(h & 0x7fffu) << 13;
  float f;
  memcpy(&f, &shifted, 4);
  f *= 5.192296858534828e33f;  // 2^112 moves the exponent bias from 15 to 127, subnormals included
  uint32_t u;
  memcpy(&u, &f, 4);
  if (shifted >= 0x0f800000u) u |= 0x7f800000u;
  u |= static_cast<uint32_t>(h & 0x8000u) << 16;
  memcpy(&f, &u, 4);
  return f;
}

PETAL_INLINE uint16_t float_to_half(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return sign | 0x7e00u;
  if (u >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or more
  if (u < 0x38800000u) {                        // subnormal: let the adder round at the right bit
    float a;
    memcpy(&a, &u, 4);
    a += 0.5f;
    memcpy(&u, &a, 4);
    return sign | static_cast<uint16_t>(u - 0x3f000000u);
  }
  u += 0xc8000fffu + ((u >> 13) & 1u);
  return sign | static_cast<uint16_t>(u >> 13);
}

PETAL_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
PETAL_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_mem*>(p) = v; }

PETAL_INLINE vf load(const bf16_t* p) {
  const vh raw = *reinterpret_cast<const vh_mem*>(p);
  return reinterpret_cast<vf>(__builtin_convertvector(raw, vu) << 16);
}

PETAL_INLINE void store(bf16_t* p, vf v) {
  const vu u = reinterpret_cast<vu>(v);
  const vu even = u + 0x7fffu + ((u >> 16) & 1u);  // to nearest, ties to even
  const vu nan = reinterpret_cast<vu>(v != v);
  const vu rounded = ((even & ~nan) | (nan & 0x7fc00000u)) >> 16;
  *reinterpret_cast<vh_mem*>(p) = __builtin_convertvector(rounded, vh);
}

PETAL_INLINE vf load(const fp16_t* p) {
#if defined(__AVX512F__) && PETAL_VL == 16
  return reinterpret_cast<vf>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__) && PETAL_VL == 8
  return reinterpret_cast<vf>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vf v;
  for (int i = 0; i < kVL; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

PETAL_INLINE void store(fp16_t* p, vf v) {
#if defined(__AVX512F__) && PETAL_VL == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(__F16C__) && PETAL_VL == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
  for (int i = 0; i < kVL; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// Past the caches, for results larger than they are. p is on a vector boundary.
PETAL_INLINE void stream(float* p, vf v) {
#if defined(__AVX512F__) && PETAL_VL == 16
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX2__) && PETAL_VL == 8
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#else
  store(p, v);
#endif
}
template <typename T>
PETAL_INLINE void stream(T* p, vf v) {
  store(p, v);
}

// Orders streamed stores before whatever tells another thread that they are there.
PETAL_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first n (< kVL) elements; what lies beyond is neither read nor written.
template <typename T>
PETAL_INLINE vf load_part(const T* p, int64_t n) {
  T tmp[kVL] = {};
  for (int64_t i = 0; i < n; ++i) tmp[i] = p[i];
  return load(tmp);
}

template <typename T>
PETAL_INLINE void store_part(T* p, vf v, int64_t n) {
  T tmp[kVL];
  store(tmp, v);
  for (int64_t i = 0; i < n; ++i) p[i] = tmp[i];
}

template <typename T>
PETAL_INLINE float to_float(T v) {
  T tmp[kVL] = {};
  tmp[0] = v;
  return load(tmp)[0];
}
template <>
PETAL_INLINE float to_float<float>(float v) {
  return v;
}
template <>
PETAL_INLINE float to_float<bf16_t>(bf16_t v) {
  const uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

PETAL_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
PETAL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace PETAL_ISA
}  // namespace petal
