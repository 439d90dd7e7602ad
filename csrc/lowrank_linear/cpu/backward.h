// Backward of lowrank_linear on the CPU, g_k being the gradient of h (h_k, h core_k) from output k,
// and m_k as in kernel.cpp. Per block of rows, the columns of dy_k in chunks that are
// packed once and used three times:
//   g_k  = scale_k * mask_k * (dy_k P_k),  dP_k^T += m_k^T dy_k,  dx += dy_k W_k (weights given)
//   dh   = sum_k g_k  (mode: g_k core_k^T, dcore_k += h^T g_k), or every g_k in its own columns
//   dA_k += dh_k^T drop_k(x),  dx += sum over the down-projections of mask_k * (dh_k A_k)
// The masks of x are drawn once per block, for both. Traffic: dy, x and h are read once, dx and dh
// are written once. Weight gradients are fp32 partials, one per split of the rows, which depend on
// N alone: the same bits for any number of threads.
#pragma once

#include "parts.h"

namespace petal {
namespace PETAL_ISA {
namespace {

struct BackwardBlock {
  float *h, *dh;           // [block, h_ld]
  float *m, *between, *g;  // [block, padded(R)]
  float* gt;               // the same as panels
  float* chunk;            // [kChunk / kNR][block][kNR]: columns of dy_k, later of x
  float* dx;               // [padded(D) / kNR][block][kNR], or null
  uint8_t* bits;           // the masks of x, [n_downs][block][bits_ld(D)]
};

template <typename A>
BackwardBlock carve_backward(const LowrankArgs& a, A& arena) {
  BackwardBlock b = {};
  const int64_t wide = a.block * h_ld(a), size = a.block * padded(highest_rank(a));
  b.h = arena.take(wide), b.dh = arena.take(wide);
  b.m = arena.take(size), b.between = arena.take(size);
  b.g = arena.take(size), b.gt = arena.take(size);
  b.chunk = arena.take(a.block * kChunk);
  if (a.outs[0].weight) b.dx = arena.take(a.block * padded(a.D));
  if (masks_x(a)) {
    b.bits = reinterpret_cast<uint8_t*>(arena.take(n_downs(a) * a.block * bits_ld(a.D) / 4));
  }
  return b;
}

PETAL_INLINE Mask mask_of(const LowrankArgs& a, const BackwardBlock& b, int64_t k, int64_t col) {
  const int64_t ld = bits_ld(a.D);
  return {b.bits + k * a.block * ld + col / 8, ld, a.dropout.scale};
}

// A split, whose partials its first block writes and the others add to.
struct Place {
  int64_t split;
  bool first;
};

// All that reads dy_k: g_k = dy_k P_k, the partials of dP_k^T, and dx += dy_k W_k.
template <typename T>
void read_dy(const LowrankArgs& a, const BackwardBlock& b, int64_t k, Place at, Span s) {
  const LowrankOutput& o = a.outs[k];
  const int64_t width = padded(o.R);
  const T* dy = static_cast<const T*>(o.dy) + s.row0 * o.dy_row;
  float* dup = o.dup ? o.dup + at.split * n_panels(o.width) * o.R * kNR : nullptr;
  for (int64_t c = 0; c < o.width; c += kChunk) {
    const int64_t n = least(kChunk, o.width - c);
    to_panels(b.chunk, dy + c, o.dy_row, s.rows, n, a.block);
    const Rows chunk = panels(b.chunk, a.block);
    if (a.need_dh) {
      gemm({b.g, width, kNR}, c > 0, chunk, s.rows, n, o.up + c * kNR, o.width * kNR, o.R);
    }
    if (dup) {
      gemm_columns({dup + c * o.R, kNR, o.R * kNR}, !at.first, b.m, width, o.R, b.chunk,
                   a.block * kNR, s.rows, n_panels(n));
    }
    if (b.dx) {
      gemm({b.dx, kNR, a.block * kNR}, k > 0 || c > 0, chunk, s.rows, n, o.weight + c * kNR,
           o.width * kNR, padded(a.D));
    }
  }
}

// dh from the masked g_k, through the core where there is one.
void add_dh(const LowrankArgs& a, const BackwardBlock& b, int64_t k, Place at, Span s) {
  const LowrankOutput& o = a.outs[k];
  const int64_t width = padded(o.R), cols = round_up(o.R, kVL), ld = h_ld(a);
  MaskedRows rows = {b.g, width, b.g, width, cols};
  if (a.own) rows.dst = b.dh + o.at, rows.dst_ld = ld;
  mask_rows(rows, s.rows, o.scale, m_dropout(a), static_cast<uint32_t>(k), s.row0);
  if (a.own) return;
  if (a.site == Site::kMode) {
    if (o.dcore) {
      to_panels(b.gt, b.g, width, s.rows, o.R, a.block);
      gemm_columns({o.dcore + at.split * n_panels(o.R) * o.R * kNR, kNR, o.R * kNR}, !at.first, b.h,
                   ld, o.R, b.gt, a.block * kNR, s.rows, n_panels(o.R));
    }
    gemm({b.dh, ld, kNR}, k > 0, row_major(b.g, width), s.rows, o.R, o.core_t, o.R * kNR, o.R);
    return;
  }
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t r = 0; r < cols; r += kVL) {
      const vf g = load(b.g + i * width + r);
      float* dh = b.dh + i * ld + r;
      store(dh, k > 0 ? load(dh) + g : g);
    }
  }
}

// dA_k^T partials from dh_k and the (masked) block of x.
template <typename T>
void add_ddown(const LowrankArgs& a, const BackwardBlock& b, Place at, Span s) {
  float* ddown = a.ddown + at.split * n_panels(a.D) * a.middle * kNR;
  const T* x = static_cast<const T*>(a.x) + s.row0 * a.x_row;
  const auto add = [&](int64_t c, int64_t n, int64_t first,
                       int64_t R) __attribute__((always_inline)) {
    gemm_columns({ddown + c * a.middle + first * kNR, kNR, a.middle * kNR}, !at.first, b.dh + first,
                 h_ld(a), R, b.chunk, a.block * kNR, s.rows, n_panels(n));
  };
  for (int64_t c = 0; c < a.D; c += kChunk) {
    const int64_t n = least(kChunk, a.D - c);
    if (!masks_x(a)) {
      to_panels(b.chunk, x + c, a.x_row, s.rows, n, a.block);
      add(c, n, 0, a.middle);
      continue;
    }
    for (int64_t k = 0; k < n_downs(a); ++k) {
      to_panels(b.chunk, x + c, a.x_row, s.rows, n, a.block, mask_of(a, b, k, c));
      add(c, n, a.outs[k].at, a.own ? a.outs[k].R : a.middle);
    }
  }
}

// t += the sum of mask_k * (dh_k A_k). What came before waits in memory: registers are for one
// product.
template <int M>
PETAL_INLINE void add_masked(Tile<M>& t, const LowrankArgs& a, const BackwardBlock& b, int64_t i,
                             int64_t j) {
  float sum[M * kNR];
  for (int64_t k = 0; k < n_downs(a); ++k) {
    const int64_t first = a.outs[k].at, R = a.own ? a.outs[k].R : a.middle;
    const Mask mask = mask_of(a, b, k, j * kNR);
    put(t, sum, kNR);
    asm volatile("" : : "r"(sum) : "memory");
    clear(t);
    mac_rows(t, row_major(b.dh + first, h_ld(a)), i, a.down + (j * a.middle + first) * kNR, R);
    each(t, [&](int r, vf& v0, vf& v1) __attribute__((always_inline)) {
      v0 = load(sum + r * kNR) + mask(i + r, 0, v0);
      v1 = load(sum + r * kNR + kVL) + mask(i + r, kVL, v1);
    });
  }
}

// dx = base part + dh U, or + the sum of mask_k * (dh_k A_k).
template <typename T, bool kMasked>
void write_dx(const LowrankArgs& a, const BackwardBlock& b, Span s) {
  T* dx = static_cast<T*>(a.dx) + s.row0 * a.D;
  const Output<T> out = {dx,
                         a.D,
                         a.dx_has_base ? dx : nullptr,
                         a.D,
                         nullptr,
                         a.D,
                         !a.dx_has_base && may_stream(static_cast<T*>(a.dx), a.D, a.N * a.D)};
  const Block base = {b.dx, kNR, a.block * kNR};
  const int64_t cols = n_panels(a.D), step = panels_near(a.middle);
  for (int64_t j0 = 0; j0 < cols; j0 += step) {
    for_row_tiles(s.rows, [&](auto height, int64_t i) __attribute__((always_inline)) {
      constexpr int M = decltype(height)::value;
      for (int64_t j = j0; j < least(cols, j0 + step); ++j) {
        if (a.dx_has_base) prefetch_rows(dx + i * a.D + (j + 3) * kNR, a.D, M);
        Tile<M> t;
        b.dx ? read(t, base, i, j) : clear(t);
        if (kMasked) {
          add_masked(t, a, b, i, j);
        } else if (a.down) {
          mac_rows(t, row_major(b.dh, h_ld(a)), i, a.down + j * a.middle * kNR, a.middle);
        }
        emit(t, out, i, j);
      }
    });
  }
}

// The masks of a block of x.
void draw_masks(const LowrankArgs& a, const BackwardBlock& b, Span s) {
  const int64_t ld = bits_ld(a.D);
  for (int64_t k = 0; k < n_downs(a); ++k) {
    draw_bits(b.bits + k * a.block * ld, ld, a.dropout, static_cast<uint32_t>(k), s.row0, s.rows, 0,
              (a.D + 7) / 8);
  }
}

template <typename T>
void backward_of(const LowrankArgs& a, int64_t split, int64_t row0, int64_t row1, float* scratch) {
  Arena arena = {scratch};
  const BackwardBlock b = carve_backward(a, arena);
  for (int64_t row = row0; row < row1; row += a.block) {
    const Span s = {row, least(a.block, row1 - row)};
    const Place at = {split, row == row0};
    hidden_rows<T>(a, s, b.h);
    for (int64_t k = 0; k < a.K; ++k) {
      if (a.outs[k].dup && !same_m(a, k)) form_m<T>(b.m, b.between, a, k, b.h, s);
      read_dy<T>(a, b, k, at, s);
      if (a.need_dh) add_dh(a, b, k, at, s);
    }
    if (a.dh) {
      from_rows(static_cast<T*>(a.dh) + row * a.middle, a.middle, b.dh, h_ld(a), s.rows, a.middle);
    }
    const bool masked = masks_x(a) && (a.ddown || (a.dx && a.down));
    if (masked) draw_masks(a, b, s);
    if (a.ddown) add_ddown<T>(a, b, at, s);
    if (a.dx && a.down && masked) {
      write_dx<T, true>(a, b, s);
    } else if (a.dx) {
      write_dx<T, false>(a, b, s);
    }
  }
  stream_fence();
}

}  // namespace
}  // namespace PETAL_ISA
}  // namespace petal
