// What forward and backward of lowrank_linear on the CPU share: where the parts of h lie, what the
// outputs read of it, and the masks of x.
//
// h of a block is rows `h_ld` floats apart. Where every output has its own part, they lie side by
// side as in storage, and a whole vector may be stored over the end of one: the next part, or the
// slack behind the last, takes it.
#pragma once

#include "common/cpu/block.h"
#include "common/cpu/dropout.h"
#include "params.h"

namespace petal {
namespace PETAL_ISA {
namespace {

constexpr int64_t kChunk = 256;  // columns packed at a time: block * kChunk floats fit L2

// Panels of a right operand of `depth` rows that stay near while rows are written along them.
PETAL_INLINE int64_t panels_near(int64_t depth) { return most(1, 1024 / depth); }

PETAL_INLINE int64_t h_ld(const LowrankArgs& a) { return padded(a.middle) + (a.own ? kNR : 0); }

PETAL_INLINE int64_t widest(const LowrankArgs& a) {
  int64_t width = 0;
  for (int64_t k = 0; k < a.K; ++k) width = most(width, a.outs[k].width);
  return width;
}
PETAL_INLINE int64_t highest_rank(const LowrankArgs& a) {
  int64_t rank = 0;
  for (int64_t k = 0; k < a.K; ++k) rank = most(rank, a.outs[k].R);
  return rank;
}

// Whether x is read under masks; every down-projection reads it under its own.
PETAL_INLINE bool masks_x(const LowrankArgs& a) {
  return a.site == Site::kInput && a.dropout.threshold != 0;
}
PETAL_INLINE int64_t n_downs(const LowrankArgs& a) { return a.own ? a.K : 1; }

// Bytes of the masks of a row of x.
PETAL_INLINE int64_t bits_ld(int64_t cols) { return round_up((cols + 7) / 8, 8); }

// Multiplies a chunk of x by its mask: `bits` begins at the chunk's first row and column, and `kept`
// is the factor of what is not dropped.
struct Mask {
  const uint8_t* bits;
  int64_t ld;
  float kept;
  PETAL_INLINE vf operator()(int64_t i, int64_t col, vf v) const {
    return v * multipliers(bits + i * ld, col, kept);
  }
};

template <typename T>
void hidden_rows(const LowrankArgs& a, Span s, float* h) {
  to_rows(h, h_ld(a), static_cast<const T*>(a.hidden) + s.row0 * a.hidden_row, a.hidden_row, s.rows,
          a.middle);
}

// m_k, what output k reads of h: scale_k * mask_k * (h | h_k | h core_k). Whether it is m_(k-1).
PETAL_INLINE bool same_m(const LowrankArgs& a, int64_t k) {
  const bool drawn = a.site == Site::kMode || (a.site != Site::kInput && a.dropout.threshold);
  return k > 0 && !a.own && !drawn && a.outs[k].scale == a.outs[k - 1].scale;
}

PETAL_INLINE CpuDropout m_dropout(const LowrankArgs& a) {
  CpuDropout d = a.dropout;
  if (a.site == Site::kInput) d.threshold = 0;
  return d;
}

// m from h, rows of padded(R_k); `between` holds h core_k, rounded to storage as the reference
// does.
template <typename T>
void form_m(float* m, float* between, const LowrankArgs& a, int64_t k, const float* h, Span s) {
  const LowrankOutput& o = a.outs[k];
  const int64_t width = padded(o.R), cols = round_up(o.R, kVL);
  MaskedRows rows = {m, width, h + o.at, h_ld(a), cols};
  if (a.site == Site::kMode) {
    gemm({between, width, kNR}, false, row_major(h, h_ld(a)), s.rows, o.R, o.core, o.R * kNR,
         width);
    round_rows<T>(between, s.rows * width);
    rows.src = between, rows.src_ld = width;
  }
  mask_rows(rows, s.rows, o.scale, m_dropout(a), static_cast<uint32_t>(k), s.row0);
}

}  // namespace
}  // namespace PETAL_ISA
}  // namespace petal
