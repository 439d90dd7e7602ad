// gated_bottleneck on the CPU: one pass over blocks of rows that stay in cache, compiled per
// instruction set.
//
// Forward, per block of rows (storage becomes fp32 panels once):
//   z = x down^T + down_bias,  zg = gate_input gate_down^T + gate_down_bias   rounded, kept
//   a = act(route(z)),  ag = act(zg)       r wide
//   logit = w_x . gate_input + w_h . H + gate_bias (+ (up^T w_h) . a where it reads Y) kept, fp32
//   per panel of columns:  Y = a up^T + up_bias + H
//                          G = sigmoid(ag gate_up^T + gate_up_bias) or of the logit, or per channel
//                          u = residual + mask * scale * G * Y           over H, in cache
//   out = u, or (u - mean) * rstd * norm_weight + norm_bias: the variance in a second pass over the
//   block
// H is x, base or 0, gate_weight is (w_x, w_h); other names are the operator's arguments. Gate
// "small" needs the sample's logits first: a block holds whole samples, or a longer sample is
// walked twice.
//
// Shapes   row tensors [N, width] of any row stride, unit column stride; parameters of any strides.
// Grid     a task: a block of at most 128 rows, all columns.
// Traffic  every row tensor is read once (gate_input serves gate and residual), out, z and zg are
//          written once.
// Numerics fp32 accumulation in index order; z and zg are rounded to storage, out once.
// Limits   fp32, fp16, bf16; parameters fp32 too. Same bits for any number of threads.
// Source   ops/gated_bottleneck/reference.py. Backward: backward.h.
#include "backward.h"

namespace petal {
namespace PETAL_ISA {
namespace {

struct ForwardBlock {
  Middle middle;
  float* y;       // x, then H, then Y, then u
  float* other;   // gate_input, then the residual
  float* gate;    // one panel of the large gate
  float* factor;  // [block]: scale * G
  float* sums;    // [block][kVL]
  uint8_t* bits;
};

template <typename A>
ForwardBlock carve_forward(const GatedArgs& a, A& arena) {
  ForwardBlock b = {};
  carve(b.middle, a, false, arena);
  b.y = arena.take(a.block * padded(most(a.D, a.O)));
  b.other = arena.take(a.block * padded(most(a.Dg, a.O)));
  b.gate = arena.take(a.block * kNR);
  b.factor = arena.take(a.block);
  b.sums = arena.take(a.block * kVL);
  b.bits = reinterpret_cast<uint8_t*>(arena.take(a.block * bits_ld(a) / 4));
  return b;
}

// z = A B + bias, A wide, rounded to storage and kept.
void shrink(float* z, const GatedArgs& a, const CpuRows& saved, const float* from, int64_t depth,
            int64_t width, const float* weight, const float* bias, Span s) {
  project_in_chains(narrow(z, width), {panels(from, a.block), depth, weight}, s.rows,
                    n_panels(width), bias);
  clear_padding(narrow(z, width), s.rows, width);
  round_to(a.type, z, s.rows * padded(width));
  store_narrow(a, saved, z, s, width);
}

// Which of a walk's two passes over a long sample: the logits alone, or the rest; or both at once.
enum class Pass { kLogits, kRest, kBoth };

// The row tensors and all that is r wide.
void open_block(const GatedArgs& a, ForwardBlock& b, Pass pass, Span s) {
  Middle& m = b.middle;
  // A first pass forms z only where the logit reads Y, the second then finds it kept.
  const bool has_z = a.z_given || (pass == Pass::kRest && a.weight_a);
  const bool wants_z = pass != Pass::kLogits || a.weight_a;
  if (a.x.p) load_wide(b.y, a, a.x, s, a.D);
  if (wants_z) {
    if (has_z) {
      load_narrow(m.z, a, a.z, s, a.R);
    } else {
      shrink(m.z, a, a.z, b.y, a.D, a.R, a.down_t, a.down_bias, s);
    }
    route(m, a, s);
    activate(m.a, m.q, s.rows * padded(a.R), a.activation);
  }
  if (a.base.p) load_wide(b.y, a, a.base, s, a.O);
  if (a.gate_input.p) load_wide(b.other, a, a.gate_input, s, a.Dg);
  if (a.gate == Gate::kLarge) {
    shrink(m.zg, a, a.zg, b.other, a.Dg, a.Rg, a.gate_down_t, a.gate_down_bias, s);
    activate(m.ag, m.zg, s.rows * padded(a.Rg), a.activation);
  }
}

void write_logits(const GatedArgs& a, const ForwardBlock& b, Span s) {
  const bool has_h = a.add_input || a.base.p;
  memset(b.sums, 0, s.rows * kVL * sizeof(float));
  for_wide(a, s.rows, a.O, [&](int64_t i, int64_t col, int64_t k) __attribute__((always_inline)) {
    vf terms = load(b.sums + i * kVL) + load(b.other + k) * load(a.weight_x + col);
    if (has_h) terms += load(b.y + k) * load(a.weight_h + col);
    store(b.sums + i * kVL, terms);
  });
  const int64_t width = padded(a.R);
  for (int64_t i = 0; i < s.rows; ++i) {
    float logit = sum(load(b.sums + i * kVL));
    if (a.weight_a) logit += dot(b.middle.a + i * width, a.weight_a, width);
    a.logits[s.row0 + i] = logit + (a.logit_bias ? a.logit_bias[0] : 0.0f);
  }
}

// Panel j: u over H.
void gated_panel(const GatedArgs& a, const ForwardBlock& b, int64_t j, int64_t rows) {
  const bool residual = a.add_gate_input || a.residual.p, large = a.gate == Gate::kLarge;
  const Masked factor(a, b.factor, b.bits);
  const int64_t col0 = j * kNR;
  float* y = b.y + col0 * a.block;
  const float* other = b.other + col0 * a.block;
  project({y, kNR, 0}, a.add_input || a.base.p,
          {row_major(b.middle.a, padded(a.R)), a.R, a.up_t + col0 * a.R}, rows, 1,
          a.up_bias ? a.up_bias + col0 : nullptr);
  if (large) {
    project({b.gate, kNR, 0}, false,
            {row_major(b.middle.ag, padded(a.Rg)), a.Rg, a.gate_up_t + col0 * a.Rg}, rows, 1,
            a.gate_up_bias ? a.gate_up_bias + col0 : nullptr);
  }
  if (j == a.O / kNR) {
    clear_padding({y, kNR, 0}, rows, a.O % kNR);
    if (large) clear_padding({b.gate, kNR, 0}, rows, a.O % kNR);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < kNR; c += kVL) {
      const int64_t k = i * kNR + c;
      vf u = load(y + k) * factor(i, col0 + c);
      if (large) u *= sigmoid_of(load(b.gate + k));
      if (a.channel) u *= load(a.channel + col0 + c);
      if (residual) u += load(other + k);
      store(y + k, u);
      if (a.norm_weight) store(b.sums + i * kVL, load(b.sums + i * kVL) + u);
    }
  }
}

// u -> the norm of u, from the sums of u; its moments are kept.
void normalise(const GatedArgs& a, const ForwardBlock& b, Span s) {
  float* moments = a.moments + 2 * s.row0;
  for (int64_t i = 0; i < s.rows; ++i) {
    moments[2 * i] = sum(load(b.sums + i * kVL)) / static_cast<float>(a.O);
    store(b.sums + i * kVL, vf{});
  }
  for_wide(a, s.rows, a.O, [&](int64_t i, int64_t col, int64_t k) __attribute__((always_inline)) {
    vf d = load(b.y + k) - moments[2 * i];
    for (int64_t c = most(a.O - col, 0); c < kVL; ++c) d[c] = 0.0f;
    store(b.sums + i * kVL, load(b.sums + i * kVL) + d * d);
  });
  for (int64_t i = 0; i < s.rows; ++i) {
    const float variance = sum(load(b.sums + i * kVL)) / static_cast<float>(a.O);
    moments[2 * i + 1] = 1.0f / __builtin_sqrtf(variance + a.eps);
  }
  for_wide(a, s.rows, a.O, [&](int64_t i, int64_t col, int64_t k) __attribute__((always_inline)) {
    const vf xhat = (load(b.y + k) - moments[2 * i]) * moments[2 * i + 1];
    store(b.y + k, xhat * load(a.norm_weight + col) + load(a.norm_bias + col));
  });
}

// All that follows the logits.
void close_block(const GatedArgs& a, const ForwardBlock& b, Span s) {
  row_factors(b.factor, a, s);
  draw_block(b.bits, a, s);
  if (a.residual.p) load_wide(b.other, a, a.residual, s, a.O);
  if (a.norm_weight) memset(b.sums, 0, s.rows * kVL * sizeof(float));
  for (int64_t j = 0; j < n_panels(a.O); ++j) gated_panel(a, b, j, s.rows);
  if (a.norm_weight) normalise(a, b, s);
  write(a, a.out, a.O, b.y, {}, s);
}

void forward(const GatedArgs& a, int64_t row0, int64_t row1, float* scratch) {
  Arena arena = {scratch};
  ForwardBlock b = carve_forward(a, arena);
  const bool twice = a.gate == Gate::kSmall && row1 - row0 > a.block;
  for (int64_t row = row0; twice && row < row1; row += a.block) {
    const Span s = {row, least(a.block, row1 - row)};
    open_block(a, b, Pass::kLogits, s);
    write_logits(a, b, s);
  }
  for (int64_t row = row0; row < row1; row += a.block) {
    const Span s = {row, least(a.block, row1 - row)};
    open_block(a, b, twice ? Pass::kRest : Pass::kBoth, s);
    if (!twice && a.weight_x) write_logits(a, b, s);
    close_block(a, b, s);
  }
  stream_fence();
}

int64_t forward_scratch(const GatedArgs& a) {
  Sizer sizer;
  carve_forward(a, sizer);
  return sizer.n;
}

int64_t backward_scratch(const GatedArgs& a) {
  Sizer sizer;
  carve_backward(a, sizer);
  return sizer.n;
}

}  // namespace

const GatedKernels& gated_kernels() {
  static const GatedKernels table = {
      {kNR, kMR, pack, reduce}, forward_scratch, backward_scratch, forward, backward};
  return table;
}

}  // namespace PETAL_ISA
}  // namespace petal
