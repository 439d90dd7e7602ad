// What forward and backward of gated_bottleneck share: pieces of scratch, row tensors to panels and
// back, column and row sums, the middle of a block, the gate of its rows.
//
// Wide blocks are fp32 panels [width / kNR][block][kNR]; r-wide ones are rows of padded(r) floats.
// Padding columns are zero wherever they enter a sum.
#pragma once

#include "common/cpu/activation.h"
#include "common/cpu/block.h"
#include "common/cpu/dropout.h"
#include "params.h"

namespace petal {
namespace PETAL_ISA {
namespace {

PETAL_INLINE Block wide(const GatedArgs& a, float* p) { return {p, kNR, a.block * kNR}; }
PETAL_INLINE Block narrow(float* p, int64_t width) { return {p, padded(width), kNR}; }

// Zeros in the columns from `cols` on. An infinite number times a weight's padding is NaN, and sums
// over a row take whole vectors.
PETAL_INLINE void clear_padding(const Block& c, int64_t rows, int64_t cols) {
  const int64_t first = cols % kNR;
  if (first == 0) return;
  float* p = c.p + cols / kNR * c.panel + first;
  for (int64_t i = 0; i < rows; ++i) memset(p + i * c.row, 0, (kNR - first) * sizeof(float));
}

// f(row, column, offset) for every vector of a wide block.
template <typename F>
PETAL_INLINE void for_wide(const GatedArgs& a, int64_t rows, int64_t cols, const F& f) {
  for (int64_t j = 0; j < n_panels(cols); ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (j * a.block + i) * kNR;
      f(i, j * kNR, at);
      f(i, j * kNR + kVL, at + kVL);
    }
  }
}

// ---- rows to and from storage

void load_wide(float* dst, const GatedArgs& a, const CpuRows& src, Span s, int64_t cols) {
  PETAL_BY_TYPE(a.type,
                to_panels(dst, from_row<const T>(src, s.row0), src.ld, s.rows, cols, a.block));
}

void load_narrow(float* dst, const GatedArgs& a, const CpuRows& src, Span s, int64_t cols) {
  PETAL_BY_TYPE(a.type,
                to_rows(dst, padded(cols), from_row<const T>(src, s.row0), src.ld, s.rows, cols));
}

void store_narrow(const GatedArgs& a, const CpuRows& dst, const float* src, Span s, int64_t cols) {
  PETAL_BY_TYPE(a.type,
                from_rows(from_row<T>(dst, s.row0), dst.ld, src, padded(cols), s.rows, cols));
}

// ---- products

// c = A B + bias in short chains, for the products whose error a route amplifies: rounding grows
// with the length of a chain. A short sum gets the shortest: its extra passes over c are cheap.
void project_in_chains(const Block& c, const Product& m, int64_t rows, int64_t panels,
                       const float* bias) {
  const int64_t chain = m.K < 64 ? 8 : m.K < 256 ? 16 : 32;
  for (int64_t j = 0; j < panels; ++j) {
    for (int64_t k = 0; k < m.K; k += chain) {
      Product part = {m.a, least(chain, m.K - k), m.b + (j * m.K + k) * kNR};
      part.a.p += m.a.panel ? k / m.a.width * m.a.panel + k % m.a.width : k;
      const bool last = m.K - k <= chain;
      project({c.p + j * c.panel, c.row, 0}, k > 0, part, rows, 1,
              last && bias ? bias + j * kNR : nullptr);
    }
  }
}

// A result [N, cols]: base (a wide block, or null) + A B (B null: nothing).
template <typename T>
void write_of(const GatedArgs& a, const CpuRows& out, int64_t cols, const float* base,
              const Product& m, Span s) {
  T* p = static_cast<T*>(out.p);
  const bool streamed = may_stream(p, out.ld, a.N * cols);
  const Output<T> o = {p + s.row0 * out.ld, out.ld, nullptr, 0, nullptr, cols, streamed};
  for (int64_t j = 0; j < n_panels(cols); ++j) {
    for_row_tiles(s.rows, [&](auto height, int64_t i) __attribute__((always_inline)) {
      Tile<decltype(height)::value> t;
      clear(t);
      if (m.b) mac_rows(t, m.a, i, m.b + j * m.K * kNR, m.K);
      if (base) {
        const float* from = base + (j * a.block + i) * kNR;
        each(t, [=](int r, vf& v0, vf& v1) __attribute__((always_inline)) {
          v0 += load(from + r * kNR);
          v1 += load(from + r * kNR + kVL);
        });
      }
      emit(t, o, i, j);
    });
  }
}
void write(const GatedArgs& a, const CpuRows& out, int64_t cols, const float* base,
           const Product& m, Span s) {
  PETAL_BY_TYPE(a.type, write_of<T>(a, out, cols, base, m, s));
}

// ---- the middle: z, its route, its activation

struct RouteScratch {
  float *f, *t;             // [block][padded(R)]: f(z), and a block in panels
  float *p, *dp;            // [block][padded(V)]
  float *left_t, *right_t;  // packed [R, V]
  float *left, *right;      // packed [V, R]
  float *dleft, *dright;    // [V][padded(R)]: of the sample under way
  int64_t sample;           // whose matrices are packed
};

struct Middle {
  float *z, *q, *a;  // [block][padded(R)]: a = act(q), q = route(z)
  float *zg, *ag;    // [block][padded(Rg)]: ag = act(zg)
  RouteScratch route;
};

template <typename A>
void carve(Middle& m, const GatedArgs& a, bool backward, A& arena) {
  const int64_t r = a.block * padded(a.R), g = a.block * padded(a.Rg);
  m.z = arena.take(r);
  m.q = a.route == Route::kNone ? m.z : arena.take(r);
  m.a = arena.take(r);
  if (a.gate == Gate::kLarge) m.zg = arena.take(g), m.ag = arena.take(g);
  RouteScratch& s = m.route;
  s.sample = -1;
  if (a.route == Route::kNone) return;
  const int64_t rows = a.V * padded(a.R), columns = a.R * padded(a.V);
  if (backward) s.dleft = arena.take(rows), s.dright = arena.take(rows);
  s.left = arena.take(rows), s.right = arena.take(rows);
  if (a.route != Route::kProduct) return;
  s.f = arena.take(r), s.t = arena.take(r);
  s.p = arena.take(a.block * padded(a.V));
  s.left_t = arena.take(columns);
  if (backward) {
    s.dp = arena.take(a.block * padded(a.V));
    s.right_t = arena.take(columns);
  }
}

// ---- sums over a block

// Where a split's partial sums stand: `first` is true for the first block that adds to them.
struct Place {
  int64_t split;
  bool first;
};

typedef double vd __attribute__((vector_size(PETAL_VL * 8)));

// partial (+)= sum over rows of f(row, offset of a vector in c), in double within a block: such
// sums are long and their terms cancel.
template <typename F>
PETAL_INLINE void add_over_rows(float* partial, Place at, const Block& c, int64_t rows,
                                int64_t cols, const F& f) {
  partial += at.split * padded(cols);
  for (int64_t col = 0; col < padded(cols); col += kVL) {
    const int64_t from = col / kNR * c.panel + col % kNR;
    vd total = {};
    if (!at.first) total = __builtin_convertvector(load(partial + col), vd);
    for (int64_t i = 0; i < rows; ++i) total += __builtin_convertvector(f(i, from + i * c.row), vd);
    store(partial + col, __builtin_convertvector(total, vf));
  }
}

// partial (+)= columns of c, each row times its weight (or 1).
void add_columns(float* partial, Place at, const Block& c, int64_t rows, int64_t cols,
                 const float* weights) {
  if (partial == nullptr) return;
  add_over_rows(partial, at, c, rows, cols, [&](int64_t i, int64_t k) {
    return weights ? load(c.p + k) * weights[i] : load(c.p + k);
  });
}

// partial [R, cols] (+)= A^T B, A narrow, B wide.
void add_product(float* partial, Place at, const GatedArgs& a, const float* narrow_a, int64_t R,
                 const float* b, int64_t rows, int64_t cols) {
  if (partial == nullptr) return;
  const int64_t panels = n_panels(cols);
  const Block c = {partial + at.split * panels * R * kNR, kNR, R * kNR};
  gemm_columns(c, !at.first, narrow_a, padded(R), R, b, a.block * kNR, rows, panels);
}

// ---- gates of one number per row

// Mean of the sigmoids of a sample's logits, padding left out by the weights.
float pooled_gate(const GatedArgs& a, int64_t sample) {
  const float* logits = a.logits + sample * a.L;
  const float* weights = a.token_weights ? a.token_weights + sample * a.L : nullptr;
  vf total = {};
  for (int64_t i = 0; i < a.L; i += kVL) {
    const int64_t n = least(kVL, a.L - i);
    const vf share = weights ? load_part(weights + i, n) : splat(1.0f / static_cast<float>(a.L));
    const vf gate = sigmoid_of(load_part(logits + i, n)) * share;
    for (int64_t k = 0; k < n; ++k) total[k] += gate[k];
  }
  return sum(total);
}

// factor[i] = scale * G of row i (1 where the gate is not of this kind); logits must be there.
void row_factors(float* factor, const GatedArgs& a, Span s) {
  int64_t sample = -1;
  float gate = 1.0f;
  for (int64_t i = 0; i < s.rows; ++i) {
    if (a.gate == Gate::kMiddleX) gate = sigmoid_of(splat(a.logits[s.row0 + i]))[0];
    if (a.gate == Gate::kSmall && (s.row0 + i) / a.L != sample) {
      sample = (s.row0 + i) / a.L;
      gate = pooled_gate(a, sample);
    }
    factor[i] = a.scale * gate;
  }
}

// ---- dropout: the bits of a block, drawn once

PETAL_INLINE int64_t bits_ld(const GatedArgs& a) { return round_up(a.O, 8 * kVL) / 8; }

void draw_block(uint8_t* bits, const GatedArgs& a, Span s) {
  if (a.dropout.threshold == 0) return;
  draw_bits(bits, bits_ld(a), a.dropout, 0, s.row0, s.rows, 0, (a.O + 7) / 8);
}

// The multiplier of an element: a number per row, and the mask where there is one.
struct Masked {
  const float* row;
  const uint8_t* bits;
  int64_t ld;
  float scale;
  Masked(const GatedArgs& a, const float* rows, const uint8_t* drawn)
      : row(rows),
        bits(a.dropout.threshold ? drawn : nullptr),
        ld(bits_ld(a)),
        scale(a.dropout.scale) {}
  PETAL_INLINE vf operator()(int64_t i, int64_t col) const {
    return bits ? row[i] * multipliers(bits + i * ld, col, scale) : splat(row[i]);
  }
};

}  // namespace
}  // namespace PETAL_ISA
}  // namespace petal
