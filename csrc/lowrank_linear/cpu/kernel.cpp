// lowrank_linear on the CPU: one pass over blocks of rows that stay in cache, compiled per
// instruction set.
//
// Forward, per block of rows (x in fp32 panels, converted once where storage is 16-bit):
//   h   = drop(x) U^T                      rounded to storage and kept
//   m_k = scale * mask_k * (h | h core_k)  r wide
//   y_k = base_k + m_k P_k^T               base_k: x W_k^T + b_k in the same accumulators, or given
// Backward, per block, the columns of dy_k in chunks that are packed once and used three times:
//   g_k  = scale * mask_k * (dy_k P_k),  dP_k^T += m_k^T dy_k,  dx += dy_k W_k (weights given)
//   dh   = sum_k g_k  (mode: g_k core_k^T, dcore_k += h^T g_k)
//   dU  += dh^T drop(x),  dx += mask * (dh U)
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
#include "common/cpu/block.h"
#include "common/cpu/dropout.h"
#include "params.h"

namespace petal {
namespace PETAL_ISA {
namespace {

constexpr int64_t kChunk = 256;  // columns of dy packed at a time: block * kChunk floats fit L2
constexpr int64_t kDepth =
    1024;  // contraction length of the base product before it spills to memory

PETAL_INLINE int64_t widest(const LowrankArgs& a) {
  int64_t width = 0;
  for (int64_t k = 0; k < a.K; ++k) width = width < a.outs[k].width ? a.outs[k].width : width;
  return width;
}

// The block of x as a row operand: in place for fp32, else (or where it is masked) converted.
template <typename T>
struct Input {
  PETAL_INLINE static Rows rows(const LowrankArgs& a, int64_t row0, int64_t rows, float* scratch) {
    to_panels(scratch, static_cast<const T*>(a.x) + row0 * a.x_row, a.x_row, rows, a.D, a.block);
    return panels(scratch, a.block);
  }
};
template <>
struct Input<float> {
  PETAL_INLINE static Rows rows(const LowrankArgs& a, int64_t row0, int64_t, float*) {
    return row_major(static_cast<const float*>(a.x) + row0 * a.x_row, a.x_row);
  }
};

template <typename T>
void hidden_rows(const LowrankArgs& a, int64_t row0, int64_t rows, float* h) {
  to_rows(h, padded(a.R), static_cast<const T*>(a.hidden) + row0 * a.hidden_row, a.hidden_row, rows,
          a.R);
}

// m_k from h; `middle` holds h core_k, rounded to storage as the reference does.
template <typename T>
void masked_middle(float* m, float* middle, const LowrankArgs& a, int64_t k, const float* h,
                   int64_t row0, int64_t rows) {
  const int64_t width = padded(a.R);
  const float* from = h;
  if (a.site == Site::kMode) {
    gemm({middle, width, kNR}, false, row_major(h, width), rows, a.R, a.outs[k].core, a.R * kNR,
         width / kNR);
    round_rows<T>(middle, rows * width);
    from = middle;
  }
  CpuDropout d = a.dropout;
  if (a.site == Site::kInput) d.threshold = 0;
  mask_rows(m, from, width, rows, a.scale, d, static_cast<uint32_t>(k), row0);
}

// ---- forward

template <typename T>
int64_t forward_scratch_of(const LowrankArgs& a) {
  const int64_t r = a.block * padded(a.R), d = a.block * padded(a.D);
  const bool masked = a.site == Site::kInput && a.dropout.threshold;
  return 3 * round_up(r, 16) + (Storage<T>::kFloat ? 0 : d) + (masked ? d : 0) +
         (a.D > kDepth && a.outs[0].weight ? a.block * padded(widest(a)) : 0) + 64;
}

template <typename T>
void shrink(const LowrankArgs& a, const Rows& x, int64_t row0, int64_t rows, float* h,
            float* masked) {
  const int64_t width = padded(a.R);
  Rows from = x;
  if (a.site == Site::kInput && a.dropout.threshold) {
    to_panels(masked, static_cast<const T*>(a.x) + row0 * a.x_row, a.x_row, rows, a.D, a.block);
    mask_panels(masked, a.block, rows, padded(a.D), a.dropout, 0, row0, 0);
    from = panels(masked, a.block);
  }
  gemm({h, width, kNR}, false, from, rows, a.D, a.down, a.D * kNR, width / kNR);
  round_rows<T>(h, rows * width);
  if (a.h) from_rows(static_cast<T*>(a.h) + row0 * a.R, a.R, h, width, rows, a.R);
}

// y_k = base_k + m P_k^T; the base product runs in the same accumulators.
template <typename T>
void expand(const LowrankArgs& a, const LowrankOutput& o, const Rows& x, const float* m,
            int64_t row0, int64_t rows, float* spill) {
  const int64_t width = padded(a.R), cols = n_panels(o.width);
  const T* base = o.base ? static_cast<const T*>(o.base) + row0 * o.base_row : nullptr;
  const Output<T> out = {static_cast<T*>(o.y) + row0 * o.width,
                         o.width,
                         base,
                         o.base_row,
                         o.bias,
                         o.width,
                         may_stream(static_cast<T*>(o.y), o.width, a.N * o.width)};
  const Rows middle = row_major(m, width);
  const Block partial = {spill, kNR, a.block * kNR};
  int64_t first = 0;  // columns of x already contracted into `partial`
  if (o.weight) {
    for (; a.D - first > kDepth; first += kDepth) {
      Rows part = x;
      part.p += part.panel ? first / kNR * part.panel : first;
      gemm(partial, first > 0, part, rows, kDepth, o.weight + first * kNR, a.D * kNR, cols);
    }
  }
  Rows rest = x;
  if (o.weight) rest.p += rest.panel ? first / kNR * rest.panel : first;
  for (int64_t j = 0; j < cols; ++j) {
    for_row_tiles(rows, [&](auto height, int64_t i) __attribute__((always_inline)) {
      constexpr int M = decltype(height)::value;
      if (base && i + 3 * M <= rows)
        prefetch_rows(base + (i + 2 * M) * o.base_row + j * kNR, o.base_row, M);
      Tile<M> t;
      first > 0 ? read(t, partial, i, j) : clear(t);
      if (o.weight) mac_rows(t, rest, i, o.weight + (j * a.D + first) * kNR, a.D - first);
      mac_rows(t, middle, i, o.up + j * a.R * kNR, a.R);
      emit(t, out, i, j);
    });
  }
}

template <typename T>
void forward_of(const LowrankArgs& a, int64_t row0, int64_t rows, float* scratch) {
  Arena arena = {scratch};
  const int64_t width = padded(a.R);
  float* h = arena.take(a.block * width);
  float* m = arena.take(a.block * width);
  float* middle = arena.take(a.block * width);
  float* converted = Storage<T>::kFloat ? nullptr : arena.take(a.block * padded(a.D));
  float* masked =
      a.site == Site::kInput && a.dropout.threshold ? arena.take(a.block * padded(a.D)) : nullptr;
  Rows x = {};
  if (a.x) x = Input<T>::rows(a, row0, rows, converted);
  if (a.hidden) {
    hidden_rows<T>(a, row0, rows, h);
  } else {
    shrink<T>(a, x, row0, rows, h, masked);
  }
  const bool same = a.site != Site::kMode && (a.site == Site::kInput || a.dropout.threshold == 0);
  for (int64_t k = 0; k < a.K; ++k) {
    if (k == 0 || !same) masked_middle<T>(m, middle, a, k, h, row0, rows);
    expand<T>(a, a.outs[k], x, m, row0, rows, arena.p);
  }
  stream_fence();
}

// ---- backward

template <typename T>
int64_t backward_scratch_of(const LowrankArgs& a) {
  const int64_t r = round_up(a.block * padded(a.R), 16);
  return 6 * r + a.block * kChunk + (a.outs[0].weight ? a.block * padded(a.D) : 0) + 64;
}

struct BackwardBlock {
  float *h, *m, *middle, *g, *dh, *gt;  // [block, padded(R)]
  float* chunk;                         // [kChunk / kNR][block][kNR]: columns of dy_k, later of x
  float* dx;                            // [padded(D) / kNR][block][kNR], or null
};

// All that reads dy_k: g_k = dy_k P_k, the partials of dP_k^T, and dx += dy_k W_k.
template <typename T>
void read_dy(const LowrankArgs& a, const BackwardBlock& b, int64_t k, int64_t split,
             bool first_block, int64_t row0, int64_t rows) {
  const LowrankOutput& o = a.outs[k];
  const int64_t width = padded(a.R);
  const T* dy = static_cast<const T*>(o.dy) + row0 * o.dy_row;
  float* dup = o.dup ? o.dup + split * n_panels(o.width) * a.R * kNR : nullptr;
  for (int64_t c = 0; c < o.width; c += kChunk) {
    const int64_t n = least(kChunk, o.width - c);
    to_panels(b.chunk, dy + c, o.dy_row, rows, n, a.block);
    const Rows chunk = panels(b.chunk, a.block);
    if (a.need_dh) {
      gemm({b.g, width, kNR}, c > 0, chunk, rows, n, o.up + c * kNR, o.width * kNR, width / kNR);
    }
    if (dup) {
      gemm_columns({dup + c * a.R, kNR, a.R * kNR}, !first_block, b.m, width, a.R, b.chunk,
                   a.block * kNR, rows, n_panels(n));
    }
    if (b.dx) {
      gemm({b.dx, kNR, a.block * kNR}, k > 0 || c > 0, chunk, rows, n, o.weight + c * kNR,
           o.width * kNR, n_panels(a.D));
    }
  }
}

// dh += the masked g_k, through the core where there is one.
void add_dh(const LowrankArgs& a, const BackwardBlock& b, int64_t k, int64_t split,
            bool first_block, int64_t row0, int64_t rows) {
  const LowrankOutput& o = a.outs[k];
  const int64_t width = padded(a.R);
  CpuDropout d = a.dropout;
  if (a.site == Site::kInput) d.threshold = 0;
  mask_rows(b.g, b.g, width, rows, a.scale, d, static_cast<uint32_t>(k), row0);
  if (a.site == Site::kMode) {
    if (o.dcore) {
      to_panels(b.gt, b.g, width, rows, a.R, a.block);
      gemm_columns({o.dcore + split * n_panels(a.R) * a.R * kNR, kNR, a.R * kNR}, !first_block, b.h,
                   width, a.R, b.gt, a.block * kNR, rows, n_panels(a.R));
    }
    gemm({b.dh, width, kNR}, k > 0, row_major(b.g, width), rows, a.R, o.core_t, a.R * kNR,
         width / kNR);
    return;
  }
  for (int64_t i = 0; i < rows * width; i += kVL) {
    const vf g = load(b.g + i);
    store(b.dh + i, k > 0 ? load(b.dh + i) + g : g);
  }
}

// dU^T partials from dh and the (masked) block of x.
template <typename T>
void add_ddown(const LowrankArgs& a, const BackwardBlock& b, int64_t split, bool first_block,
               int64_t row0, int64_t rows) {
  float* ddown = a.ddown + split * n_panels(a.D) * a.R * kNR;
  const T* x = static_cast<const T*>(a.x) + row0 * a.x_row;
  for (int64_t c = 0; c < a.D; c += kChunk) {
    const int64_t n = least(kChunk, a.D - c);
    to_panels(b.chunk, x + c, a.x_row, rows, n, a.block);
    if (a.site == Site::kInput && a.dropout.threshold) {
      mask_panels(b.chunk, a.block, rows, padded(n), a.dropout, 0, row0, c);
    }
    gemm_columns({ddown + c * a.R, kNR, a.R * kNR}, !first_block, b.dh, padded(a.R), a.R, b.chunk,
                 a.block * kNR, rows, n_panels(n));
  }
}

// dx = base part + mask * (dh U).
template <typename T, bool kMasked>
void write_dx(const LowrankArgs& a, const BackwardBlock& b, int64_t row0, int64_t rows) {
  T* dx = static_cast<T*>(a.dx) + row0 * a.D;
  const Output<T> out = {dx,
                         a.D,
                         a.dx_has_base ? dx : nullptr,
                         a.D,
                         nullptr,
                         a.D,
                         !a.dx_has_base && may_stream(static_cast<T*>(a.dx), a.D, a.N * a.D)};
  const Rows dh = row_major(b.dh, padded(a.R));
  const Block base = {b.dx, kNR, a.block * kNR};
  const bool starts_from_base = b.dx && !kMasked;
  for (int64_t j = 0; j < n_panels(a.D); ++j) {
    for_row_tiles(rows, [&](auto height, int64_t i) __attribute__((always_inline)) {
      constexpr int M = decltype(height)::value;
      if (a.dx_has_base && i + 3 * M <= rows)
        prefetch_rows(dx + (i + 2 * M) * a.D + j * kNR, a.D, M);
      Tile<M> t;
      starts_from_base ? read(t, base, i, j) : clear(t);
      if (a.down) mac_rows(t, dh, i, a.down + j * a.R * kNR, a.R);
      if (kMasked) {
        const int64_t group = j * kNR / (8 * kVL) * (8 * kVL), col = j * kNR - group;
        const float* from = b.dx ? base.p + j * base.panel + i * base.row : nullptr;
        uint8_t bits[kMR * kVL];
        draw_bits(bits, a.dropout, 0, row0 + i, M, group);
        each(t, [&](int r, vf& v0, vf& v1) __attribute__((always_inline)) {
          v0 *= multipliers(bits + r * kVL, col, a.dropout.scale);
          v1 *= multipliers(bits + r * kVL, col + kVL, a.dropout.scale);
          if (from) v0 += load(from + r * kNR), v1 += load(from + r * kNR + kVL);
        });
      }
      emit(t, out, i, j);
    });
  }
}

template <typename T>
void backward_of(const LowrankArgs& a, int64_t split, int64_t row0, int64_t row1, float* scratch) {
  Arena arena = {scratch};
  const int64_t size = a.block * padded(a.R);
  BackwardBlock b = {};
  b.h = arena.take(size), b.m = arena.take(size), b.middle = arena.take(size);
  b.g = arena.take(size), b.dh = arena.take(size), b.gt = arena.take(size);
  b.chunk = arena.take(a.block * kChunk);
  b.dx = a.outs[0].weight ? arena.p : nullptr;
  for (int64_t row = row0; row < row1; row += a.block) {
    const int64_t rows = least(a.block, row1 - row);
    const bool first = row == row0;
    hidden_rows<T>(a, row, rows, b.h);
    const bool same = a.site != Site::kMode && (a.site == Site::kInput || a.dropout.threshold == 0);
    for (int64_t k = 0; k < a.K; ++k) {
      if (a.outs[k].dup && (k == 0 || !same)) masked_middle<T>(b.m, b.middle, a, k, b.h, row, rows);
      read_dy<T>(a, b, k, split, first, row, rows);
      if (a.need_dh) add_dh(a, b, k, split, first, row, rows);
    }
    if (a.dh) from_rows(static_cast<T*>(a.dh) + row * a.R, a.R, b.dh, padded(a.R), rows, a.R);
    if (a.ddown) add_ddown<T>(a, b, split, first, row, rows);
    if (a.dx && a.site == Site::kInput && a.dropout.threshold && a.down) {
      write_dx<T, true>(a, b, row, rows);
    } else if (a.dx) {
      write_dx<T, false>(a, b, row, rows);
    }
  }
  stream_fence();
}

// ---- the table

int64_t forward_scratch(const LowrankArgs& a, DType type) {
  PETAL_BY_TYPE(type, return forward_scratch_of<T>(a));
  return 0;
}
int64_t backward_scratch(const LowrankArgs& a, DType type) {
  PETAL_BY_TYPE(type, return backward_scratch_of<T>(a));
  return 0;
}
void forward(const LowrankArgs& a, DType type, int64_t row0, int64_t rows, float* scratch) {
  PETAL_BY_TYPE(type, forward_of<T>(a, row0, rows, scratch));
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
