// The dropout generator on vectors: petal_kernels/_runtime/philox.py, eight columns per counter.
//
// A vector holds one word of kDraw counters, neighbouring column groups of one row, in the low
// halves of its 64-bit elements: a product of two of them is one instruction and leaves both
// halves that the next round wants where they are read. A counter is (row, group), so what the
// first two rounds multiply depends on the row alone or on the group alone: each is computed once
// for all the others, and five rounds remain. The result is one byte per group, bit j for column
// 8 * group + j. The scalar form in philox.h is not used: an inline function shared by objects of
// several instruction sets may be taken from the wrong one.
#pragma once

#include "isa.h"
#include "simd.h"

namespace petal {

namespace PETAL_ISA {

constexpr int kDraw = kVL / 2;  // column groups whose counters share a vector

typedef uint64_t vq __attribute__((vector_size(PETAL_VL * 4)));

constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
constexpr uint32_t kKey0 = 0x9E3779B9u, kKey1 = 0xBB67AE85u;

PETAL_INLINE vq whole(uint64_t v) { return vq{} + v; }

// Products of the low halves.
PETAL_INLINE vq multiply(vq a, uint32_t b) {
#if defined(__AVX512F__) && PETAL_VL == 16
  return reinterpret_cast<vq>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__) && PETAL_VL == 8
  return reinterpret_cast<vq>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__) && PETAL_VL == 4
  return reinterpret_cast<vq>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
}

// The group of every element: in the order that makes the bytes of `keep_bytes` neighbours.
PETAL_INLINE vq lane_groups() {
  vq groups;
  for (int i = 0; i < kDraw; ++i) groups[i] = i;
#if defined(__AVX512BW__) && PETAL_VL == 16
  for (int i = 0; i < kDraw; ++i) groups[i] = i / 2 + i % 2 * (kDraw / 2);
#endif
  return groups;
}

// The kDraw bytes of counters whose words are the halves of v01 and v23, the first one low.
PETAL_INLINE void keep_bytes(uint8_t* out, vq v01, vq v23, uint32_t threshold) {
#if defined(__AVX512BW__) && PETAL_VL == 16
  const __m512i a = reinterpret_cast<__m512i>(v01), b = reinterpret_cast<__m512i>(v23);
  const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  const uint32_t bytes[2] = {_mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(a, b), least),
                             _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(a, b), least)};
  memcpy(out, bytes, 8);
#elif defined(__AVX2__) && PETAL_VL == 8
  const __m256i a = reinterpret_cast<__m256i>(v01), b = reinterpret_cast<__m256i>(v23);
  const __m256i least = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
  const __m256i keep = _mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_max_epu16(even, least), even),
                                          _mm256_cmpeq_epi16(_mm256_max_epu16(odd, least), odd));
  const uint32_t bytes = static_cast<uint32_t>(_mm256_movemask_epi8(keep));
  memcpy(out, &bytes, 4);
#else
  typedef uint16_t lanes __attribute__((vector_size(PETAL_VL * 4)));
  const auto nibbles = [=](vq v) __attribute__((always_inline)) {
    const lanes keep =
        reinterpret_cast<lanes>(reinterpret_cast<lanes>(v) >= static_cast<uint16_t>(threshold));
    vq bits = reinterpret_cast<vq>(keep) & whole(0x0008000400020001u);
    bits |= bits >> 32;
    bits |= bits >> 16;
    return bits & 15u;
  };
  const vq bytes = nibbles(v01) | nibbles(v23) << 4;
  for (int i = 0; i < kDraw; ++i) out[i] = static_cast<uint8_t>(bytes[i]);
#endif
}

// A counter after two rounds is ({row.hi1 ^ group.lo1, row.lo1, group.hi0 ^ row.lo0, group.lo0}.
struct DrawnRow {
  uint64_t hi1, lo1, lo0;
};
struct DrawnGroups {
  vq lo1, hi0, lo0;
};

PETAL_INLINE DrawnRow draw_row(const CpuDropout& d, uint32_t stream, int64_t row) {
  const uint64_t p0 = static_cast<uint64_t>(kMul0) * static_cast<uint32_t>(row);
  const uint32_t key0 = static_cast<uint32_t>(d.seed) + kKey0;
  const uint32_t key1 = static_cast<uint32_t>(d.seed >> 32);
  const uint32_t c2 = static_cast<uint32_t>(p0 >> 32) ^ (d.offset + stream) ^ key1;
  const uint64_t p1 = static_cast<uint64_t>(kMul1) * c2;
  return {(p1 >> 32) ^ key0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0) ^ static_cast<uint32_t>(key1 + kKey1)};
}

PETAL_INLINE DrawnGroups draw_groups(const CpuDropout& d, int64_t row, int64_t group) {
  const vq p1 = multiply(lane_groups() + static_cast<uint64_t>(group), kMul1);
  const uint32_t high = static_cast<uint32_t>(row >> 32) ^ static_cast<uint32_t>(d.seed);
  const vq p0 = multiply((p1 >> 32) ^ whole(high), kMul0);
  return {p1, p0 >> 32, p0};
}

// Rounds 3 to 7.
PETAL_INLINE void draw(uint8_t* out, const CpuDropout& d, const DrawnRow& row,
                       const DrawnGroups& group) {
  vq c0 = group.lo1 ^ row.hi1, c1 = whole(row.lo1), c2 = group.hi0 ^ row.lo0, c3 = group.lo0;
  uint32_t key0 = static_cast<uint32_t>(d.seed) + 2 * kKey0;
  uint32_t key1 = static_cast<uint32_t>(d.seed >> 32) + 2 * kKey1;
  for (int round = 2; round < 6; ++round, key0 += kKey0, key1 += kKey1) {
    const vq p0 = multiply(c0, kMul0), p1 = multiply(c2, kMul1);
    c0 = (p1 >> 32) ^ c1 ^ whole(key0);
    c2 = (p0 >> 32) ^ c3 ^ whole(key1);
    c1 = p1;
    c3 = p0;
  }
  const vq p0 = multiply(c0, kMul0), p1 = multiply(c2, kMul1), low = whole(0xffffffffu);
  const vq v01 = ((p1 >> 32) | (p1 << 32)) ^ ((c1 ^ whole(key0)) & low);
  const vq v23 = ((p0 >> 32) | (p0 << 32)) ^ ((c3 ^ whole(key1)) & low);
  keep_bytes(out, v01, v23, d.threshold);
}

// The bytes of `groups` column groups from `group` on, of rows [row0, row0 + rows): at
// bits[i * ld]. kDraw bytes are written at a time.
inline void draw_bits(uint8_t* bits, int64_t ld, const CpuDropout& d, uint32_t stream, int64_t row0,
                      int64_t rows, int64_t group, int64_t groups) {
  constexpr int64_t kRows = 64;
  DrawnRow drawn[kRows];
  while (rows > 0) {
    // Rows whose numbers have the same high half.
    const int64_t n = least(least(rows, kRows), (int64_t{1} << 32) - (row0 & 0xffffffff));
    for (int64_t i = 0; i < n; ++i) drawn[i] = draw_row(d, stream, row0 + i);
    for (int64_t g = 0; g < groups; g += kDraw) {
      const DrawnGroups of = draw_groups(d, row0, group + g);
      for (int64_t i = 0; i < n; ++i) draw(bits + i * ld + g, d, drawn[i], of);
    }
    rows -= n, row0 += n, bits += n * ld;
  }
}

// 0 or `kept` for the kVL columns from `col` on, given the bytes of the row's groups.
PETAL_INLINE vf multipliers(const uint8_t* bits, int64_t col, float kept) {
#if defined(__AVX512F__) && PETAL_VL == 16
  uint16_t keep;
  memcpy(&keep, bits + col / 8, 2);
  return reinterpret_cast<vf>(_mm512_maskz_mov_ps(keep, reinterpret_cast<__m512>(splat(kept))));
#else
  vu lane;
#if PETAL_VL == 16
  const uint32_t byte = bits[col / 8] | (static_cast<uint32_t>(bits[col / 8 + 1]) << 8);
#else
  const uint32_t byte = bits[col / 8] >> (col % 8);
#endif
  for (int i = 0; i < kVL; ++i) lane[i] = 1u << i;
  const vu keep = reinterpret_cast<vu>((lane & byte) != 0u);
  return reinterpret_cast<vf>(keep & reinterpret_cast<vu>(splat(kept)));
#endif
}

// The left operand of `mask_rows` and where its product goes: `cols` floats of every row, a
// multiple of kVL.
struct MaskedRows {
  float* dst;
  int64_t dst_ld;
  const float* src;
  int64_t src_ld;
  int64_t cols;
};

// dst = src * factor (* mask). Zeros of dropped elements come from a product, so that NaN stays NaN
// as it does in the reference.
inline void mask_rows(const MaskedRows& m, int64_t rows, float factor, const CpuDropout& d,
                      uint32_t stream, int64_t row0) {
  constexpr int64_t kRows = 16, kBytes = 16;
  uint8_t bits[kRows * kBytes];
  const float kept = d.scale * factor;
  for (int64_t i0 = 0; i0 < rows; i0 += kRows) {
    const int64_t n = least(rows - i0, kRows);
    for (int64_t c = 0; c < m.cols; c += 8 * kBytes) {
      const int64_t cols = least(m.cols - c, 8 * kBytes);
      if (d.threshold) draw_bits(bits, kBytes, d, stream, row0 + i0, n, c / 8, (cols + 7) / 8);
      for (int64_t i = 0; i < n; ++i) {
        const float* src = m.src + (i0 + i) * m.src_ld + c;
        float* dst = m.dst + (i0 + i) * m.dst_ld + c;
        for (int64_t j = 0; j < cols; j += kVL) {
          const vf by = d.threshold ? multipliers(bits + i * kBytes, j, kept) : splat(factor);
          store(dst + j, load(src + j) * by);
        }
      }
    }
  }
}

}  // namespace PETAL_ISA
}  // namespace petal
