// lowrank_linear on the CPU: one pass over blocks of rows that stay in cache, compiled per
// instruction set.
//
// Forward, per block of rows (x packed in fp32, a piece that the nearest cache holds at a time):
//   h   = x U^T, all down-projections side by side, or h_k = drop_k(x) A_k^T; rounded, kept
//   m_k = scale_k * mask_k * (h | h_k | h core_k)  R wide
//   y_k = base_k + m_k P_k^T               base_k: x W_k^T + b_k in the same accumulators, or given
// Backward: backward.h.
//
// Shapes   x [N, D], y_k, base_k and dy_k [N, O_k] of any row stride, unit column stride;
//          parameters of any strides.
// Grid     a task: a block of at most 192 rows, in backward a split of the rows; all outputs.
// Traffic  forward reads x and base and writes y and h once; backward reads dy, x, h and writes dx
//          once.
// Numerics fp32 accumulation in index order; h and h core_k are rounded to storage, results once.
//          Weight gradients are fp32 partials, one per split.
// Limits   fp32, fp16, bf16; parameters fp32 too. The splits depend on N alone: same bits for any
//          number of threads.
// Source   ops/lowrank_linear/reference.py.
#include "backward.h"

namespace petal {
namespace PETAL_ISA {
namespace {

// Columns of x that the base's product contracts before its accumulators spill to memory.
constexpr int64_t kDepth = 1024;
constexpr int64_t kNearRows = 24;  // of x: with kChunk columns they fit L1

struct ForwardBlock {
  float* h;            // [block, h_ld]
  float *m, *between;  // [block, padded(R)]
  float* parts;        // h_k [block, padded(R_k)] one after the other, where x is masked
  float* near;         // [kChunk / kNR][kNearRows][kNR]: columns of x, masked or not
  float* x;            // [padded(D) / kNR][block][kNR], where the base's product reads it
  float* spill;        // of the base product
};

template <typename A>
ForwardBlock carve_forward(const LowrankArgs& a, A& arena) {
  ForwardBlock b = {};
  const int64_t size = a.block * padded(highest_rank(a));
  b.h = arena.take(a.block * h_ld(a));
  b.m = arena.take(size), b.between = arena.take(size);
  if (masks_x(a)) b.parts = arena.take(a.block * (a.middle + n_downs(a) * kNR));
  b.near = arena.take(kNearRows * kChunk);
  if (a.outs[0].weight) b.x = arena.take(a.block * padded(a.D));
  if (a.D > kDepth && a.outs[0].weight) b.spill = arena.take(a.block * padded(widest(a)));
  return b;
}

// The block of x is contracted piece by piece: rows and columns that the nearest cache holds are
// packed (rows far apart would evict one another there) and read by every down-projection.
// body(first row, rows, first column, columns) of a piece.
template <typename Body>
PETAL_INLINE void for_pieces(const LowrankArgs& a, int64_t rows, const Body& body) {
  for (int64_t i = 0; i < rows; i += kNearRows) {
    for (int64_t c = 0; c < a.D; c += kChunk) {
      body(i, least(kNearRows, rows - i), c, least(kChunk, a.D - c));
    }
  }
}

// h = x U^T.
template <typename T>
void shrink(const LowrankArgs& a, const ForwardBlock& b, Span s) {
  const int64_t width = h_ld(a);
  const T* x = static_cast<const T*>(a.x) + s.row0 * a.x_row;
  for_pieces(a, s.rows, [&](int64_t i, int64_t rows, int64_t c, int64_t n) {
    to_panels(b.near, x + i * a.x_row + c, a.x_row, rows, n, kNearRows);
    gemm({b.h + i * width, width, kNR}, c > 0, panels(b.near, kNearRows), rows, n, a.down + c * kNR,
         a.D * kNR, a.middle);
  });
}

// h_k = drop_k(x) A_k^T.
template <typename T>
void shrink_masked(const LowrankArgs& a, const ForwardBlock& b, Span s) {
  constexpr int64_t kBytes = kChunk / 8;
  uint8_t bits[kNearRows * kBytes];
  const T* x = static_cast<const T*>(a.x) + s.row0 * a.x_row;
  for_pieces(a, s.rows, [&](int64_t i, int64_t rows, int64_t c, int64_t n) {
    float* part = b.parts;
    for (int64_t k = 0; k < n_downs(a); ++k) {
      const int64_t R = a.own ? a.outs[k].R : a.middle, width = padded(R);
      draw_bits(bits, kBytes, a.dropout, static_cast<uint32_t>(k), s.row0 + i, rows, c / 8,
                (n + 7) / 8);
      to_panels(b.near, x + i * a.x_row + c, a.x_row, rows, n, kNearRows,
                Mask{bits, kBytes, a.dropout.scale});
      gemm({part + i * width, width, kNR}, c > 0, panels(b.near, kNearRows), rows, n,
           a.outs[k].down + c * kNR, a.D * kNR, R);
      part += a.block * width;
    }
  });
  const float* part = b.parts;
  for (int64_t k = 0; k < n_downs(a); ++k) {
    const int64_t R = a.own ? a.outs[k].R : a.middle, width = padded(R);
    copy_rows(b.h + a.outs[k].at, h_ld(a), part, width, s.rows, round_up(R, kVL));
    part += a.block * width;
  }
}

template <typename T>
void make_hidden(const LowrankArgs& a, const ForwardBlock& b, Span s) {
  const int64_t width = h_ld(a);
  if (masks_x(a)) {
    shrink_masked<T>(a, b, s);
  } else if (b.x) {
    gemm({b.h, width, kNR}, false, panels(b.x, a.block), s.rows, a.D, a.down, a.D * kNR, a.middle);
  } else {
    shrink<T>(a, b, s);
  }
  round_rows<T>(b.h, s.rows * width);
  if (a.h) {
    from_rows(static_cast<T*>(a.h) + s.row0 * a.middle, a.middle, b.h, width, s.rows, a.middle);
  }
}

// y_k = base_k + m P_k^T; the base product runs in the same accumulators.
template <typename T>
void expand(const LowrankArgs& a, const LowrankOutput& o, const ForwardBlock& b, Span s) {
  const int64_t cols = n_panels(o.width);
  const T* base = o.base ? static_cast<const T*>(o.base) + s.row0 * o.base_row : nullptr;
  const Output<T> out = {static_cast<T*>(o.y) + s.row0 * o.width,
                         o.width,
                         base,
                         o.base_row,
                         o.bias,
                         o.width,
                         may_stream(static_cast<T*>(o.y), o.width, a.N * o.width)};
  const Rows m = row_major(b.m, padded(o.R));
  const Block partial = {b.spill, kNR, a.block * kNR};
  Rows x = panels(b.x, a.block);
  int64_t first = 0;  // columns of x already contracted into `partial`
  if (o.weight) {
    for (; a.D - first > kDepth; first += kDepth) {
      gemm(partial, first > 0, x, s.rows, kDepth, o.weight + first * kNR, a.D * kNR, cols * kNR);
      x.p += kDepth / kNR * x.panel;
    }
  }
  // A panel of W_k serves all rows. Without one it is the rows of y that move: they are written as
  // far as panels of P_k are near.
  const int64_t step = o.weight ? 1 : panels_near(o.R);
  for (int64_t j0 = 0; j0 < cols; j0 += step) {
    for_row_tiles(s.rows, [&](auto height, int64_t i) __attribute__((always_inline)) {
      constexpr int M = decltype(height)::value;
      for (int64_t j = j0; j < least(cols, j0 + step); ++j) {
        Tile<M> t;
        first > 0 ? read(t, partial, i, j) : clear(t);
        if (o.weight) mac_rows(t, x, i, o.weight + (j * a.D + first) * kNR, a.D - first);
        mac_rows(t, m, i, o.up + j * o.R * kNR, o.R);
        emit(t, out, i, j);
      }
    });
  }
}

template <typename T>
void forward_of(const LowrankArgs& a, Span s, float* scratch) {
  Arena arena = {scratch};
  const ForwardBlock b = carve_forward(a, arena);
  if (b.x) {
    to_panels(b.x, static_cast<const T*>(a.x) + s.row0 * a.x_row, a.x_row, s.rows, a.D, a.block);
  }
  if (a.hidden) {
    hidden_rows<T>(a, s, b.h);
  } else {
    make_hidden<T>(a, b, s);
  }
  for (int64_t k = 0; k < a.K; ++k) {
    if (!same_m(a, k)) form_m<T>(b.m, b.between, a, k, b.h, s);
    expand<T>(a, a.outs[k], b, s);
  }
  stream_fence();
}

// ---- the table

int64_t forward_scratch(const LowrankArgs& a, DType) {
  Sizer sizer;
  carve_forward(a, sizer);
  return sizer.n + 64;
}
int64_t backward_scratch(const LowrankArgs& a, DType) {
  Sizer sizer;
  carve_backward(a, sizer);
  return sizer.n + 64;
}
void forward(const LowrankArgs& a, DType type, int64_t row0, int64_t rows, float* scratch) {
  PETAL_BY_TYPE(type, forward_of<T>(a, {row0, rows}, scratch));
}
void backward(const LowrankArgs& a, DType type, int64_t split, int64_t row0, int64_t row1,
              float* scratch) {
  PETAL_BY_TYPE(type, backward_of<T>(a, split, row0, row1, scratch));
}
}  // namespace

const LowrankKernels& lowrank_kernels() {
  static const LowrankKernels table = {
      {kNR, kMR, pack, reduce}, forward_scratch, backward_scratch, forward, backward};
  return table;
}

}  // namespace PETAL_ISA
}  // namespace petal
