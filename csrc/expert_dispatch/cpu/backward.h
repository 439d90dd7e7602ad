// Backward of expert_dispatch on the CPU but for the sums over rows. Per block of rows, dout
// becoming fp32 panels once:
//   per group: t = dout up                    r wide, over gathered rows where sorted
//              dg = mix (<t, act(z)> + <dout, up_bias>),  dz = mix g t act'(z), mixed as there
//   dl = softmax'(dg) + the losses'
//   dx = keep dout + dl router;  per group: dx += dz down      over dout's panels
// dz, mixed and dl, r and E wide, go to memory in fp32 for the weight gradients. Traffic: dout, z
// and logits read once, dx, dz and mixed written once.
#pragma once

#include "parts.h"

namespace petal {
namespace PETAL_ISA {
namespace {

struct BackwardBlock {
  Gates gates;
  float* wide;      // dout, then dx
  float* gathered;  // sorted: rows of one expert
  float *t, *z;     // of one group
  float* along;     // [block][experts of a group]: <dout, up_bias>
  float* dg;        // [block][E]
  float* p;         // [padded(E)]: a row's softmax over all experts
};

template <typename A>
BackwardBlock carve_backward(const ExpertArgs& a, A& arena) {
  BackwardBlock b = {};
  b.gates = carve_gates(a, arena);
  b.wide = arena.take(a.block * padded(most(a.D, a.O)));
  if (a.sorted) b.gathered = arena.take(a.block * padded(a.O));
  b.t = arena.take(a.block * narrow_ld(t_width(a)));
  b.z = arena.take(a.block * narrow_ld(z_width(a)));
  b.along = arena.take(a.block * per_group(a));
  b.dg = arena.take(a.block * a.E);
  b.p = arena.take(padded(a.E));
  return b;
}

// The first of slots [begin, end), whose rows ascend, at or behind a row.
int64_t first_slot(const int32_t* order, int64_t begin, int64_t end, int64_t row) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    order[middle] < row ? begin = middle + 1 : end = middle;
  }
  return begin;
}

void find_tokens(Gates& g, const ExpertArgs& a, Span s) {
  int32_t n = 0;
  for (int64_t e = 0; e < a.E; ++e) {
    const int64_t end = a.offsets[e + 1], begin = first_slot(a.order, a.offsets[e], end, s.row0);
    g.starts[e] = n;
    g.slots[e] = begin;
    for (int64_t k = begin; k < end && a.order[k] < s.row0 + s.rows; ++k) {
      g.tokens[n++] = static_cast<int32_t>(a.order[k] - s.row0);
    }
  }
  g.starts[a.E] = n;
}

Group backward_group(const ExpertArgs& a, const Gates& g, int64_t e, Span s) {
  if (!a.sorted) return {0, nullptr, s.rows, s.row0};
  return {e, g.tokens + g.starts[e], g.starts[e + 1] - g.starts[e], g.slots[e]};
}

PETAL_INLINE vf first_lanes(vf v, int64_t n) {
  if (n >= kVL) return v;
  vi lane;
  for (int i = 0; i < kVL; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n) ? v : vf{};
}

// dg, dz and `mixed` of a group's rows. Segments are written in whole vectors, the next one over
// what hangs out.
template <typename T>
void middle_of(const ExpertArgs& a, const BackwardBlock& b, const Group& g, Span s) {
  const int64_t experts = per_group(a), own = a.downs == 1 ? 0 : a.R;
  by_activation(a.activation, [&](Activation name) __attribute__((always_inline)) {
    for (int64_t i = 0; i < g.rows; ++i) {
      const int64_t token = g.tokens ? g.tokens[i] : i;
      const uint8_t* choice = choice_of(a, s.row0 + token);
      const float* gates = b.gates.rounded + token * padded(a.E) + g.index;
      const float *t = b.t + i * narrow_ld(t_width(a)), *z = b.z + i * narrow_ld(z_width(a));
      float* mixed = a.mixed ? a.mixed + (g.slot + i) * a.mixed_ld : nullptr;
      float* dz = a.dz ? a.dz + (g.slot + i) * a.dz_ld : nullptr;
      for (int64_t e = 0; e < experts; ++e) {
        const bool in = is_in(choice, g.index + e), add = own == 0 && e > 0;
        const float factor = a.mix * gates[e];
        vf along = {};
        for (int64_t c = 0; c < a.R; c += kVL) {
          const vf q = load(z + e * own + c), value = activation(name, q);
          if (mixed) store(mixed + e * a.R + c, in ? rounded<T>(value * gates[e]) * a.mix : vf{});
          if (!a.need_t) continue;
          const vf d = load(t + e * a.R + c);
          along += first_lanes(d * value, a.R - c);
          if (!dz) continue;
          const vf through = in ? d * derivative(name, q) * factor : vf{};
          store(dz + e * own + c, add ? load(dz + e * own + c) + through : through);
        }
        if (!a.need_gates) continue;
        const float bias = a.up_bias ? b.along[i * experts + e] : 0.0f;
        b.dg[token * a.E + g.index + e] = in ? a.mix * (sum(along) + bias) : 0.0f;
      }
      for (int64_t e = 0; mixed && e < experts; ++e) mixed[experts * a.R + e] = a.mix * gates[e];
    }
  });
}

// dg -> the logits' gradient: p_e (dg_e - sum g dg), p = g or the softmax over all.
void route_backward(const ExpertArgs& a, const BackwardBlock& b, Span s) {
  for (int64_t i = 0; i < s.rows; ++i) {
    const int64_t row = s.row0 + i;
    const float *g = b.gates.exact + i * padded(a.E), *dg = b.dg + i * a.E, *p = g;
    if (choice_of(a, row) && !a.renormalize) {
      softmax(b.p, a.logits + row * a.E, nullptr, a.E);
      p = b.p;
    }
    float inner = 0.0f;
    for (int64_t e = 0; e < a.E; ++e) inner += g[e] * dg[e];
    float* dl = a.dl + row * a.dl_ld;
    for (int64_t e = 0; e < a.E; ++e) {
      dl[e] = p[e] * (dg[e] - inner) + (a.dlogits ? a.dlogits[row * a.E + e] : 0.0f);
    }
    if (a.dnoise) memcpy(a.dnoise + row * a.E, dl, a.E * sizeof(float));
  }
}

void load_z(const ExpertArgs& a, const BackwardBlock& b, const Group& g) {
  const int64_t width = z_width(a), ld = narrow_ld(width);
  PETAL_BY_TYPE(a.type, to_rows(b.z, ld, from_row<const T>(a.z, g.slot), a.z.ld, g.rows, width));
}

void write_dx(const ExpertArgs& a, const BackwardBlock& b, Span s) {
  if (a.add_input) {
    scale_wide(b.wide, a, a.keep, s.rows, a.D);
  } else {
    clear_wide(b.wide, a, s.rows, a.D);
  }
  if (a.sorted && a.dl) {
    expand(b.wide, a, nullptr, s.rows, a.dl + s.row0 * a.dl_ld, a.dl_ld, a.E, a.router, a.D);
  }
  const int64_t depth = z_width(a) + (!a.sorted && a.dl ? a.E : 0);
  for (int64_t e = 0; e < n_groups(a); ++e) {
    const Group g = backward_group(a, b.gates, e, s);
    expand(b.wide, a, g.tokens, g.rows, a.dz + g.slot * a.dz_ld, a.dz_ld, depth,
           a.down[down_of(a, g)], a.D);
  }
  store_wide(a, a.dx, b.wide, s, a.D);
}

void backward(const ExpertArgs& a, int64_t block, float* scratch) {
  Arena arena = {scratch};
  BackwardBlock b = carve_backward(a, arena);
  const Span s = block_span(a, block);
  const int64_t width = t_width(a), experts = per_group(a);
  load_wide(b.wide, a, a.dout, s, a.O);
  form_gates(b.gates, a, s);
  if (a.sorted) find_tokens(b.gates, a, s);
  memset(b.dg, 0, s.rows * a.E * sizeof(float));
  for (int64_t e = 0; e < n_groups(a); ++e) {
    const Group g = backward_group(a, b.gates, e, s);
    if (g.rows == 0) continue;
    load_z(a, b, g);
    if (a.need_t) {
      const float* from = rows_of(b.gathered, b.wide, a, g, a.O);
      project({b.t, narrow_ld(width), kNR}, false, {panels(from, a.block), a.O, a.up[g.index]},
              g.rows, n_panels(width), nullptr);
      if (a.need_gates && a.up_bias) {
        dots(b.along, experts, from, a.block, g.rows, a.up_bias, a.E, g.index, g.index + experts,
             a.O);
      }
    }
    PETAL_BY_TYPE(a.type, middle_of<T>(a, b, g, s));
  }
  if (a.dgates) memcpy(a.dgates + s.row0 * a.E, b.dg, s.rows * a.E * sizeof(float));
  if (a.dl) route_backward(a, b, s);
  if (a.dx.p) write_dx(a, b, s);
  stream_fence();
}

}  // namespace
}  // namespace PETAL_ISA
}  // namespace petal
