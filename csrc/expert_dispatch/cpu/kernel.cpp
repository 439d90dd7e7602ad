// expert_dispatch on the CPU, compiled per instruction set. Forward, one block of rows at a time (x
// becomes fp32 panels once; those panels then become out):
//   l = x router^T + router_bias + noise, choice, gates g      kept, fp32
//   per group: z = x down^T + down_bias                        rounded to storage and kept
//              mixed = mix [ga | g], ga = round(g act(z))      r wide
//   y = keep H;  per group: y += mixed [up^T; up_bias]         over x's panels
// Stationary there is one group of all rows; its K loop runs through every expert, so y is touched
// once. Sorted, a group is an expert and the block's rows that chose it: they are gathered within
// the block and added back into it, so that nothing N k D leaves the cache and no two threads add
// to one row. z of a block lies expert by expert until the host, knowing every block's counts,
// moves those runs (r wide) to the experts' places: tokens ascend within an expert by themselves.
//
// Shapes   x [N, D], base and out [N, O] of any row stride, unit column stride; parameters of any.
// Grid     a task: a block of at most 192 rows, all experts.
// Traffic  x and base read once, out and z written once (sorted z twice).
// Numerics fp32 accumulation in index order; z, g and ga are rounded to storage, out once.
// Limits   fp32, fp16, bf16; parameters fp32 too. Same bits for any number of threads.
// Source   ops/expert_dispatch/reference.py. Backward: backward.h; weight gradients: sums.h.
#include "backward.h"
#include "sums.h"

namespace petal {
namespace PETAL_ISA {
namespace {

struct ForwardBlock {
  Gates gates;
  float* wide;      // x, then y
  float* gathered;  // sorted: rows of one expert
  float* z;         // of one group
  float* mixed;     // of all groups
};

template <typename A>
ForwardBlock carve_forward(const ExpertArgs& a, A& arena) {
  ForwardBlock b = {};
  b.gates = carve_gates(a, arena);
  b.wide = arena.take(a.block * padded(most(a.D, a.O)));
  if (a.sorted) b.gathered = arena.take(a.block * padded(a.D));
  b.z = arena.take(a.block * narrow_ld(z_width(a)));
  b.mixed = arena.take(a.block * (a.sorted ? a.top_k : 1) * a.mixed_ld);
  return b;
}

void route(const ExpertArgs& a, const ForwardBlock& b, Span s) {
  if (!a.router) return;
  float* logits = a.logits + s.row0 * a.E;
  dots(logits, a.E, b.wide, a.block, s.rows, a.router, a.E, 0, a.E, a.D);
  for (int64_t i = 0; i < s.rows; ++i, logits += a.E) {
    for (int64_t e = 0; e < a.E; ++e) {
      if (a.router_bias) logits[e] += a.router_bias[e];
      if (a.noise) logits[e] += a.noise[(s.row0 + i) * a.E + e];
    }
    if (a.gate == ExpertGate::kTopK) choose(a.chosen + (s.row0 + i) * a.E, logits, a.E, a.top_k);
  }
}

// Each expert's rows, ascending.
void list_tokens(Gates& g, const ExpertArgs& a, Span s) {
  int32_t n = 0;
  for (int64_t e = 0; e < a.E; ++e) {
    g.starts[e] = n;
    for (int64_t i = 0; i < s.rows; ++i) {
      if (choice_of(a, s.row0 + i)[e]) g.tokens[n++] = static_cast<int32_t>(i);
    }
  }
  g.starts[a.E] = n;
}

Group forward_group(const ExpertArgs& a, const Gates& g, int64_t e, Span s) {
  if (!a.sorted) return {0, nullptr, s.rows, s.row0};
  const int64_t start = g.starts[e];
  return {e, g.tokens + start, g.starts[e + 1] - start, s.row0 * a.top_k + start};
}

// `mixed` of a group's rows. Segments are written in whole vectors, the next one over what hangs
// out.
template <typename T>
void weigh_of(float* mixed, const ExpertArgs& a, const ForwardBlock& b, const Group& g, Span s) {
  const int64_t ld = narrow_ld(z_width(a)), experts = per_group(a), own = a.sorted ? 0 : a.R;
  by_activation(a.activation, [&](Activation name) __attribute__((always_inline)) {
    for (int64_t i = 0; i < g.rows; ++i, mixed += a.mixed_ld) {
      const int64_t token = g.tokens ? g.tokens[i] : i;
      const uint8_t* choice = choice_of(a, s.row0 + token);
      const float* gates = b.gates.rounded + token * padded(a.E) + g.index;
      for (int64_t e = 0; e < experts; ++e) {
        const float* z = b.z + i * ld + (a.downs == 1 ? 0 : e * own);
        const bool in = is_in(choice, g.index + e);
        for (int64_t c = 0; c < a.R; c += kVL) {
          const vf v = rounded<T>(activation(name, load(z + c)) * gates[e]) * a.mix;
          store(mixed + e * a.R + c, in ? v : vf{});
        }
      }
      for (int64_t e = 0; e < experts; ++e) mixed[experts * a.R + e] = a.mix * gates[e];
    }
  });
}

// z is kept, and where it belongs.
void save_z(const ExpertArgs& a, const ForwardBlock& b, const Group& g, Span s) {
  if (!a.z.p) return;
  const int64_t width = z_width(a);
  PETAL_BY_TYPE(a.type,
                from_rows(from_row<T>(a.z, g.slot), a.z.ld, b.z, narrow_ld(width), g.rows, width));
  for (int64_t i = 0; a.sorted && i < g.rows; ++i) {
    a.order[g.slot + i] = static_cast<int32_t>(s.row0 + g.tokens[i]);
  }
}

void forward(const ExpertArgs& a, int64_t block, float* scratch) {
  Arena arena = {scratch};
  ForwardBlock b = carve_forward(a, arena);
  const Span s = block_span(a, block);
  load_wide(b.wide, a, a.x, s, a.D);
  route(a, b, s);
  form_gates(b.gates, a, s);
  if (a.sorted) list_tokens(b.gates, a, s);
  const int64_t width = z_width(a), ld = narrow_ld(width);
  const auto mixed_of = [&](const Group& g) {
    return b.mixed + (a.sorted ? g.slot - s.row0 * a.top_k : 0) * a.mixed_ld;
  };
  for (int64_t e = 0; e < n_groups(a); ++e) {
    const Group g = forward_group(a, b.gates, e, s);
    if (a.counts && a.sorted) a.counts[block * a.E + e] = static_cast<int32_t>(g.rows);
    if (g.rows == 0) continue;
    const float* from = rows_of(b.gathered, b.wide, a, g, a.D);
    const int64_t own = down_of(a, g);
    project({b.z, ld, kNR}, false, {panels(from, a.block), a.D, a.down_t[own]}, g.rows,
            n_panels(width), a.down_bias ? a.down_bias[own] : nullptr);
    round_to(a.type, b.z, g.rows * ld);
    save_z(a, b, g, s);
    PETAL_BY_TYPE(a.type, weigh_of<T>(mixed_of(g), a, b, g, s));
  }
  if (a.add_input) {
    scale_wide(b.wide, a, a.keep, s.rows, a.O);
  } else if (a.base.p) {
    load_wide(b.wide, a, a.base, s, a.O);
    scale_wide(b.wide, a, a.keep, s.rows, a.O);
  } else {
    clear_wide(b.wide, a, s.rows, a.O);
  }
  const int64_t depth = t_width(a) + (a.up_biased ? per_group(a) : 0);
  for (int64_t e = 0; e < n_groups(a); ++e) {
    const Group g = forward_group(a, b.gates, e, s);
    expand(b.wide, a, g.tokens, g.rows, mixed_of(g), a.mixed_ld, depth, a.up_t[g.index], a.O);
  }
  store_wide(a, a.out, b.wide, s, a.O);
  stream_fence();
}

int64_t forward_scratch(const ExpertArgs& a) {
  Sizer sizer;
  carve_forward(a, sizer);
  return sizer.n;
}

int64_t backward_scratch(const ExpertArgs& a) {
  Sizer sizer;
  carve_backward(a, sizer);
  return sizer.n;
}

}  // namespace

const ExpertKernels& expert_kernels() {
  static const ExpertKernels table = {{kNR, kMR, pack, reduce},
                                      forward_scratch,
                                      backward_scratch,
                                      sum_scratch,
                                      forward,
                                      backward,
                                      add_up};
  return table;
}

}  // namespace PETAL_ISA
}  // namespace petal
