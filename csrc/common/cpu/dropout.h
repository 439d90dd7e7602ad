// The dropout generator on vectors: petal_kernels/_runtime/philox.py, eight columns per counter.
//
// A vector holds the counters of kVL neighbouring column groups of one row; the result is one byte
// per group, bit j for column 8 * group + j. The scalar form in philox.h is not used: an inline
// function shared by objects of several instruction sets may be taken from the wrong one.
#pragma once

#include "isa.h"
#include "simd.h"

namespace petal {

namespace PETAL_ISA {

typedef uint8_t vb __attribute__((vector_size(PETAL_VL)));
typedef uint8_t vb_mem __attribute__((vector_size(PETAL_VL), aligned(1), may_alias));

PETAL_INLINE void multiply_wide(vu a, uint32_t b, vu& high, vu& low) {
#if defined(__AVX512F__) && PETAL_VL == 16
  const __m512i x = reinterpret_cast<__m512i>(a), m = _mm512_set1_epi64(b);
  const __m512i even = _mm512_mul_epu32(x, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), m);
  high = reinterpret_cast<vu>(_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd));
  low = reinterpret_cast<vu>(_mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32)));
#elif defined(__AVX2__) && PETAL_VL == 8
  const __m256i x = reinterpret_cast<__m256i>(a), m = _mm256_set1_epi64x(b);
  const __m256i even = _mm256_mul_epu32(x, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), m);
  high = reinterpret_cast<vu>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
  low = reinterpret_cast<vu>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
#else
  for (int i = 0; i < kVL; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Keep bits of kVL groups from `group` on.
PETAL_INLINE vb keep_bits(const CpuDropout& d, uint32_t stream, int64_t row, int64_t group) {
  vu step;
  for (int i = 0; i < kVL; ++i) step[i] = i;
  vu c0 = vu{} + static_cast<uint32_t>(row), c1 = vu{} + static_cast<uint32_t>(row >> 32);
  vu c2 = step + static_cast<uint32_t>(group), c3 = vu{} + (d.offset + stream);
  uint32_t key0 = static_cast<uint32_t>(d.seed), key1 = static_cast<uint32_t>(d.seed >> 32);
  for (int round = 0; round < 7; ++round) {
    vu high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ key0;
    c2 = high0 ^ c3 ^ key1;
    c1 = low1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const vu words[4] = {c0, c1, c2, c3};
  vu bits = {};
  for (int w = 0; w < 4; ++w) {
    const vu low = reinterpret_cast<vu>((words[w] & 0xffffu) >= d.threshold);
    const vu high = reinterpret_cast<vu>((words[w] >> 16) >= d.threshold);
    bits |= (low & (1u << (2 * w))) | (high & (2u << (2 * w)));
  }
  return __builtin_convertvector(bits, vb);
}

// 0 or `kept` for the kVL columns from `col` on, given the bytes of the row's groups.
PETAL_INLINE vf multipliers(const uint8_t* bits, int64_t col, float kept) {
  vu lane;
#if PETAL_VL == 16
  const uint32_t byte = bits[col / 8] | (static_cast<uint32_t>(bits[col / 8 + 1]) << 8);
#else
  const uint32_t byte = bits[col / 8] >> (col % 8);
#endif
  for (int i = 0; i < kVL; ++i) lane[i] = 1u << i;
  const vu keep = reinterpret_cast<vu>((lane & byte) != 0u);
  return reinterpret_cast<vf>(keep & reinterpret_cast<vu>(splat(kept)));
}

// The bytes of columns [col, col + 8 * kVL) of `rows` rows from row0 on, kVL bytes each.
inline void draw_bits(uint8_t* bits, const CpuDropout& d, uint32_t stream, int64_t row0,
                      int64_t rows, int64_t col) {
  for (int64_t i = 0; i < rows; ++i) {
    *reinterpret_cast<vb_mem*>(bits + i * kVL) = keep_bits(d, stream, row0 + i, col / 8);
  }
}

// dst = src * factor (* mask): rows of `width` floats, a multiple of kNR. Zeros of dropped elements
// come from a product, so that NaN stays NaN as it does in the reference.
inline void mask_rows(float* dst, const float* src, int64_t width, int64_t rows, float factor,
                      const CpuDropout& d, uint32_t stream, int64_t row0) {
  if (d.threshold == 0) {
    for (int64_t i = 0; i < rows * width; i += kVL) store(dst + i, load(src + i) * factor);
    return;
  }
  for (int64_t i = 0; i < rows; ++i, dst += width, src += width) {
    for (int64_t g = 0; g < width; g += 8 * kVL) {
      uint8_t bits[kVL];
      draw_bits(bits, d, stream, row0 + i, 1, g);
      for (int64_t j = g; j < least(width, g + 8 * kVL); j += kVL) {
        store(dst + j, load(src + j) * multipliers(bits, j - g, d.scale * factor));
      }
    }
  }
}

// p *= mask on panels of `height` rows, columns [col0, col0 + cols) of the masked matrix; col0 is a
// multiple of 8 * kVL.
inline void mask_panels(float* p, int64_t height, int64_t rows, int64_t cols, const CpuDropout& d,
                        uint32_t stream, int64_t row0, int64_t col0) {
  for (int64_t g = 0; g < cols; g += 8 * kVL) {
    for (int64_t i = 0; i < rows; ++i) {
      uint8_t bits[kVL];
      draw_bits(bits, d, stream, row0 + i, 1, col0 + g);
      for (int64_t j = g; j < least(cols, g + 8 * kVL); j += kVL) {
        float* at = p + (j / kNR) * height * kNR + i * kNR + j % kNR;
        store(at, load(at) * multipliers(bits, j - g, d.scale));
      }
    }
  }
}

}  // namespace PETAL_ISA
}  // namespace petal
