// Backward of gated_bottleneck on the CPU. Per block of rows, everything N x O stays in cache:
//   Y, G again from z, zg;  xhat from them, the residual and the row's moments
//   du = rstd (g - mean(g) - xhat mean(g xhat)),  g = dout * norm_weight
//   dv = scale * mask * du;  dY = G dv;  dlogit = dv Y G (1 - G), or its sum over a row (middleX),
//   a sample times the token's weight (small), a column (middleY)
//   da = dY up,  dup^T += a^T dY;  dz = route'(da act'(q));  ddown += dz^T x;  the gate alike
//   dH = dY + dlogit w_h;  dx = dH + dz down;  dgate_input = du (+ dzg gate_down) (+ dlogit w_x)
// Where the logit reads Y, dlogit w_h belongs to dY. Traffic: every row tensor that is needed, z,
// zg and dout are read once (x and gate_input a second time, from the next cache), every row
// gradient is written once. Weight and vector gradients are fp32 partials per split of the rows;
// the splits depend on N and the samples alone, so the bits do not depend on the number of threads.
#pragma once

#include "route.h"

namespace petal {
namespace PETAL_ISA {
namespace {

struct BackwardBlock {
  Middle middle;
  float *dz, *dzg;  // [block, padded(R)], [block, padded(Rg)]
  float* y;         // Y, then dlogit of the large gate
  float* dy;        // G of the large gate, then dY, then dH
  float* du;        // dout, then du, then what dgate_input begins with
  float* other;     // the residual, then xhat, then x or gate_input
  float* factor;    // [block]: scale * G
  float* scale;     // [block]: scale alone
  float* dlogit;    // [block]: dv . Y, then the gradient of the row's logit
  float* sums;      // two of [block][kVL]
  uint8_t* bits;
};

template <typename A>
BackwardBlock carve_backward(const GatedArgs& a, A& arena) {
  BackwardBlock b = {};
  const int64_t size = a.block * padded(a.O);
  carve(b.middle, a, true, arena);
  b.dz = arena.take(a.block * padded(a.R));
  b.dzg = arena.take(a.block * padded(a.Rg));
  b.y = arena.take(size), b.dy = arena.take(size), b.du = arena.take(size);
  b.other = arena.take(a.block * padded(most(a.O, most(a.D, a.Dg))));
  b.factor = arena.take(a.block), b.scale = arena.take(a.block), b.dlogit = arena.take(a.block);
  b.sums = arena.take(2 * a.block * kVL);
  b.bits = reinterpret_cast<uint8_t*>(arena.take(a.block * bits_ld(a) / 4));
  return b;
}

PETAL_INLINE const CpuRows& base_of(const GatedArgs& a) { return a.add_input ? a.x : a.base; }

float sum_of(const float* p, int64_t n) {
  float total = 0.0f;
  for (int64_t i = 0; i < n; ++i) total += p[i];
  return total;
}

// Y and G, where they are needed.
void rebuild(const GatedArgs& a, BackwardBlock& b, Span s) {
  Middle& m = b.middle;
  load_narrow(m.z, a, a.z, s, a.R);
  route(m, a, s);
  activate(m.a, m.q, s.rows * padded(a.R), a.activation);
  row_factors(b.factor, a, s);
  for (int64_t i = 0; i < s.rows; ++i) b.scale[i] = a.scale;
  draw_block(b.bits, a, s);
  load_wide(b.du, a, a.dout, s, a.O);
  if (a.gate == Gate::kLarge) {
    load_narrow(m.zg, a, a.zg, s, a.Rg);
    activate(m.ag, m.zg, s.rows * padded(a.Rg), a.activation);
    project(wide(a, b.dy), false, {row_major(m.ag, padded(a.Rg)), a.Rg, a.gate_up_t}, s.rows,
            n_panels(a.O), a.gate_up_bias);
    clear_padding(wide(a, b.dy), s.rows, a.O);
    for_wide(a, s.rows, a.O, [&](int64_t, int64_t, int64_t k) __attribute__((always_inline)) {
      store(b.dy + k, sigmoid_of(load(b.dy + k)));
    });
  }
  if (a.gate == Gate::kNone && !a.norm_weight) return;
  const CpuRows& h = base_of(a);
  if (h.p) load_wide(b.y, a, h, s, a.O);
  project(wide(a, b.y), h.p, {row_major(m.a, padded(a.R)), a.R, a.up_t}, s.rows, n_panels(a.O),
          a.up_bias);
  clear_padding(wide(a, b.y), s.rows, a.O);
}

// dout -> du through the norm. Its gradients go to `place`, where there is one.
void norm_backward(const GatedArgs& a, BackwardBlock& b, const Place* place, Span s) {
  const Masked factor(a, b.factor, b.bits);
  const bool large = a.gate == Gate::kLarge;
  const CpuRows& residual = a.add_gate_input ? a.gate_input : a.residual;
  const float* moments = a.moments + 2 * s.row0;
  float *mean_g = b.sums, *mean_gx = b.sums + a.block * kVL;  // sums in lanes first
  if (residual.p) load_wide(b.other, a, residual, s, a.O);
  memset(b.sums, 0, 2 * a.block * kVL * sizeof(float));
  for_wide(a, s.rows, a.O, [&](int64_t i, int64_t col, int64_t k) __attribute__((always_inline)) {
    vf u = load(b.y + k) * factor(i, col);
    if (large) u *= load(b.dy + k);
    if (a.channel) u *= load(a.channel + col);
    if (residual.p) u += load(b.other + k);
    const vf xhat = (u - moments[2 * i]) * moments[2 * i + 1];
    const vf g = load(b.du + k) * load(a.norm_weight + col);
    store(b.other + k, xhat);
    store(mean_g + i * kVL, load(mean_g + i * kVL) + g);
    store(mean_gx + i * kVL, load(mean_gx + i * kVL) + g * xhat);
  });
  if (place) {
    add_columns(a.dnorm_bias, *place, wide(a, b.du), s.rows, a.O, nullptr);
    if (a.dnorm_weight) {
      add_over_rows(a.dnorm_weight, *place, wide(a, b.du), s.rows, a.O,
                    [&](int64_t, int64_t k) { return load(b.du + k) * load(b.other + k); });
    }
  }
  const float share = 1.0f / static_cast<float>(a.O);
  for (int64_t i = 0; i < s.rows; ++i) {
    mean_g[i] = sum(load(mean_g + i * kVL)) * share;  // sums of later rows lie further on
    mean_gx[i] = sum(load(mean_gx + i * kVL)) * share;
  }
  for_wide(a, s.rows, a.O, [&](int64_t i, int64_t col, int64_t k) __attribute__((always_inline)) {
    const vf g = load(b.du + k) * load(a.norm_weight + col);
    store(b.du + k, (g - mean_g[i] - load(b.other + k) * mean_gx[i]) * moments[2 * i + 1]);
  });
}

// dv = scale * mask * du -> dY, dlogit of the large gate, dv . Y of every row or channel.
void gate_backward(const GatedArgs& a, BackwardBlock& b, const Place* place, int64_t rows) {
  const Masked factor(a, b.factor, b.bits), scale(a, b.scale, b.bits);
  if (a.gate == Gate::kLarge) {
    for_wide(a, rows, a.O, [&](int64_t i, int64_t col, int64_t k) __attribute__((always_inline)) {
      const vf g = load(b.dy + k), dy = load(b.du + k) * factor(i, col) * g;
      store(b.y + k, dy * load(b.y + k) * (1.0f - g));
      store(b.dy + k, dy);
    });
    return;
  }
  for_wide(a, rows, a.O, [&](int64_t i, int64_t col, int64_t k) __attribute__((always_inline)) {
    const vf dy = load(b.du + k) * factor(i, col);
    store(b.dy + k, a.channel ? dy * load(a.channel + col) : dy);
  });
  if (a.dchannel && place) {
    add_over_rows(a.dchannel, *place, wide(a, b.y), rows, a.O, [&](int64_t i, int64_t k) {
      const int64_t col = k / (a.block * kNR) * kNR + k % kNR;
      return load(b.du + k) * scale(i, col) * load(b.y + k);
    });
  }
  if (!a.weight_x) return;
  memset(b.sums, 0, rows * kVL * sizeof(float));
  for_wide(a, rows, a.O, [&](int64_t i, int64_t col, int64_t k) __attribute__((always_inline)) {
    const vf dv = load(b.du + k) * scale(i, col);
    store(b.sums + i * kVL, load(b.sums + i * kVL) + dv * load(b.y + k));
  });
  for (int64_t i = 0; i < rows; ++i) b.dlogit[i] = sum(load(b.sums + i * kVL));
}

// All up to dY for one block; without a place only for its row sums.
void open_backward(const GatedArgs& a, BackwardBlock& b, const Place* place, Span s) {
  rebuild(a, b, s);
  if (a.norm_weight) norm_backward(a, b, place, s);
  gate_backward(a, b, place, s.rows);
}

// Wide block += column vector times row vector.
void add_rank_one(float* p, const GatedArgs& a, const float* column, const float* vector,
                  int64_t rows) {
  for_wide(a, rows, a.O, [&](int64_t i, int64_t col, int64_t k) __attribute__((always_inline)) {
    store(p + k, load(p + k) + load(vector + col) * column[i]);
  });
}

// dv . Y -> the gradient of the row's logit. `total`: of a sample longer than a block.
void logit_backward(const GatedArgs& a, BackwardBlock& b, Place at, const float* total, Span s) {
  for_samples(a, s, [&](int64_t, int64_t first, int64_t n) {
    const bool small = a.gate == Gate::kSmall;
    const float of_sample = total ? *total : small ? sum_of(b.dlogit + first, n) : 0.0f;
    const float even = 1.0f / static_cast<float>(a.L);
    for (int64_t i = first; i < first + n; ++i) {
      const float slope = sigmoid_and_slope(splat(a.logits[s.row0 + i])).slope[0];
      const float share = a.token_weights ? a.token_weights[s.row0 + i] : even;
      b.dlogit[i] = (small ? of_sample * share : b.dlogit[i]) * slope;
    }
  });
  if (a.dlogit_bias) {
    float& partial = a.dlogit_bias[at.split * kNR];
    partial = (at.first ? 0.0f : partial) + sum_of(b.dlogit, s.rows);
  }
  if (a.sees_output) add_rank_one(b.dy, a, b.dlogit, a.weight_h, s.rows);
}

// The gradients of everything that is r wide, and of up and gate_up.
void middle_backward(const GatedArgs& a, BackwardBlock& b, Place at, Span s) {
  Middle& m = b.middle;
  add_product(a.dup_t, at, a, m.a, a.R, b.dy, s.rows, a.O);
  add_columns(a.dup_bias, at, wide(a, b.dy), s.rows, a.O, nullptr);
  if (a.need_dz) {
    gemm(narrow(b.dz, a.R), false, panels(b.dy, a.block), s.rows, a.O, a.up, a.O * kNR,
         padded(a.R));
    clear_padding(narrow(b.dz, a.R), s.rows, a.R);
    multiply_derivative(b.dz, m.q, s.rows * padded(a.R), a.activation);
    route_backward(b.dz, m, a, s);
    add_columns(a.ddown_bias, at, narrow(b.dz, a.R), s.rows, a.R, nullptr);
    if (a.dz.p) store_narrow(a, a.dz, b.dz, s, a.R);
  }
  if (a.gate != Gate::kLarge) return;
  add_product(a.dgate_up_t, at, a, m.ag, a.Rg, b.y, s.rows, a.O);
  add_columns(a.dgate_up_bias, at, wide(a, b.y), s.rows, a.O, nullptr);
  if (!a.need_dzg) return;
  gemm(narrow(b.dzg, a.Rg), false, panels(b.y, a.block), s.rows, a.O, a.gate_up, a.O * kNR,
       padded(a.Rg));
  multiply_derivative(b.dzg, m.zg, s.rows * padded(a.Rg), a.activation);
  add_columns(a.dgate_down_bias, at, narrow(b.dzg, a.Rg), s.rows, a.Rg, nullptr);
}

// What reads x, H and gate_input once more: the gradients of down, gate_down and gate_weight.
void input_sums(const GatedArgs& a, BackwardBlock& b, Place at, Span s) {
  const Block other = wide(a, b.other);
  const bool reads_h = a.dweight_h && !a.sees_output;
  if (a.dweight_h && a.sees_output) {
    add_columns(a.dweight_h, at, wide(a, b.y), s.rows, a.O, b.dlogit);
  }
  if (a.ddown || (reads_h && a.add_input)) {
    load_wide(b.other, a, a.x, s, a.D);
    add_product(a.ddown, at, a, b.dz, a.R, b.other, s.rows, a.D);
    if (reads_h && a.add_input) add_columns(a.dweight_h, at, other, s.rows, a.O, b.dlogit);
  }
  if (reads_h && !a.add_input) {
    load_wide(b.other, a, a.base, s, a.O);
    add_columns(a.dweight_h, at, other, s.rows, a.O, b.dlogit);
  }
  if (a.dgate_down || a.dweight_x) {
    load_wide(b.other, a, a.gate_input, s, a.Dg);
    add_product(a.dgate_down, at, a, b.dzg, a.Rg, b.other, s.rows, a.Dg);
    add_columns(a.dweight_x, at, other, s.rows, a.O, b.dlogit);
  }
}

void write_gradients(const GatedArgs& a, BackwardBlock& b, Span s) {
  if (a.dresidual.p) write(a, a.dresidual, a.O, b.du, {}, s);
  if (a.weight_x && !a.sees_output && base_of(a).p) {
    add_rank_one(b.dy, a, b.dlogit, a.weight_h, s.rows);
  }
  if (a.dbase.p) write(a, a.dbase, a.O, b.dy, {}, s);
  if (a.dx.p) {
    const Product through = {row_major(b.dz, padded(a.R)), a.R, a.down};
    write(a, a.dx, a.D, a.add_input ? b.dy : nullptr, through, s);
  }
  if (!a.dgate_input.p) return;
  if (a.weight_x) {
    if (!a.add_gate_input) memset(b.du, 0, a.block * padded(a.O) * sizeof(float));
    add_rank_one(b.du, a, b.dlogit, a.weight_x, s.rows);
  }
  write(a, a.dgate_input, a.Dg, a.add_gate_input || a.weight_x ? b.du : nullptr,
        {row_major(b.dzg, padded(a.Rg)), a.Rg, a.gate_down}, s);
}

void backward(const GatedArgs& a, int64_t split, int64_t row0, int64_t row1, float* scratch) {
  Arena arena = {scratch};
  BackwardBlock b = carve_backward(a, arena);
  const bool small = a.gate == Gate::kSmall, twice = small && a.L > a.block;
  const int64_t step = twice ? a.L : small ? a.block / a.L * a.L : a.block;
  for (int64_t begin = row0; begin < row1; begin += step) {
    const int64_t end = least(row1, begin + step);
    float total = 0.0f;
    for (int64_t row = begin; twice && row < end; row += a.block) {
      const Span s = {row, least(a.block, end - row)};
      open_backward(a, b, nullptr, s);
      total += sum_of(b.dlogit, s.rows);
    }
    for (int64_t row = begin; row < end; row += a.block) {
      const Span s = {row, least(a.block, end - row)};
      const Place at = {split, row == row0};
      open_backward(a, b, &at, s);
      if (a.weight_x) logit_backward(a, b, at, twice ? &total : nullptr, s);
      middle_backward(a, b, at, s);
      input_sums(a, b, at, s);
      write_gradients(a, b, s);
    }
  }
  stream_fence();
}

}  // namespace
}  // namespace PETAL_ISA
}  // namespace petal
