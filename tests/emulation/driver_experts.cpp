// expert_dispatch's kernels under the address and undefined-behaviour sanitizers, as driver.cpp:
// exact-size buffers, small integers, exact sums. Gates are given as 1, or come of a router of
// zeros where one expert is chosen (a gate of 1), so that every path has one right answer.
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "driver.h"
#include "expert_dispatch/cuda/params.h"

using namespace petal;

namespace {

struct Config {
  DType dtype;
  int64_t rows, width, outs, pad;
  int experts, rank;
  bool sorted, topk, shared;
};

VectorView vector(const Matrix& m) {
  VectorView v;
  v.data = m.memory.get();
  v.stride = 1;
  v.wide = m.dtype == DType::kFloat32;
  return v;
}

float* floats(const Matrix& m) { return reinterpret_cast<float*>(m.memory.get()); }

// out = 3 H + 2 sum over the chosen of relu(x A^T + a) B^T + b.
void experts(const Config& c) {
  const DType t = c.dtype, f32 = DType::kFloat32;
  const int64_t n = c.rows, e_all = c.experts, r = c.rank, inner = e_all * r;
  const int64_t downs = c.shared ? 1 : e_all, slots = 2 * n;
  const std::string label = "experts dtype " + std::to_string(static_cast<int>(t)) +
                            (c.sorted ? " sorted" : "") + (c.topk ? " topk" : "") + " rank " +
                            std::to_string(c.rank);
  Matrix x(t, n, c.width, c.pad), h(t, n, c.outs, c.pad), dout(t, n, c.outs, c.pad);
  Matrix down(t, downs * r, c.width, c.pad), up(t, c.outs, inner, c.pad);
  Matrix down_bias(t, 1, downs * r), up_bias(f32, e_all, c.outs), gates(t, n, e_all);
  Matrix router(f32, e_all, c.width), noise(t, n, e_all), logits(f32, n, e_all);
  unsigned salt = 0;
  for (Matrix* m : {&x, &h, &dout, &down, &up, &down_bias, &up_bias}) m->fill(salt++);
  std::vector<uint8_t> chosen(n * e_all);
  const auto chosen_by = [&](int64_t i, int64_t e) {
    return c.topk ? e == i * i % e_all : e == i * i % e_all || e == (i + 1) % e_all;
  };
  for (int64_t i = 0; i < n; ++i)
    for (int64_t e = 0; e < e_all; ++e) {
      gates.set(i, e, 1.0f);
      noise.set(i, e, chosen_by(i, e) ? 1.0f : 0.0f);
      chosen[i * e_all + e] = !c.topk && chosen_by(i, e);
    }
  for (int64_t e = 0; e < e_all; ++e)
    for (int64_t d = 0; d < c.width; ++d) router.set(e, d, 0.0f);

  std::vector<int32_t> order(slots), offsets(e_all + 1), inverse(n * e_all),
      counts(ceil_div(n, kSortTokens) * e_all);
  const int64_t kept = c.sorted ? slots : n, z_cols = c.sorted || c.shared ? r : inner;
  Matrix z(t, kept, z_cols, c.pad), out(t, n, c.outs, c.pad);
  ExpertFwdParams p = {};
  p.f.dtype = t;
  p.f.rows = n;
  p.f.width = c.width;
  p.f.outs = c.outs;
  p.f.tokens_per_gate = 1;
  p.f.experts = c.experts;
  p.f.rank = c.rank;
  p.f.top_k = 1;
  p.f.activation = Activation::kRelu;
  p.f.gate = c.topk ? ExpertGate::kTopK : ExpertGate::kGiven;
  p.f.renormalize = true;
  p.f.shared = c.shared;
  p.f.x = x.view();
  p.f.down = down.view();
  p.f.up = up.view();
  p.f.z = z.view();
  p.f.down_bias = vector(down_bias);
  p.f.up_bias = vector(up_bias);
  if (c.topk) {
    p.f.router = vector(router);
    p.f.noise = vector(noise);
    p.f.logits = floats(logits);
  } else {
    p.f.gates = vector(gates);
  }
  p.f.chosen = chosen.data();
  p.f.keep = 3.0f;
  p.f.mix = 2.0f;
  p.form_logits = c.topk;
  if (c.sorted) {
    if (c.topk) check(launch_expert_dispatch_fwd(p, nullptr));
    check(launch_expert_dispatch_fwd_sort({chosen.data(), n, 1, slots, c.experts, counts.data(),
                                           order.data(), offsets.data(), inverse.data()},
                                          nullptr));
    p.f.slots = slots;
    p.f.order = order.data();
    p.f.offsets = offsets.data();
    p.f.inverse = inverse.data();
    p.form_logits = false;
    p.form_z = p.by_slot = true;
    check(launch_expert_dispatch_fwd(p, nullptr));
  }
  p.by_slot = false;
  p.form_z = !c.sorted;
  p.h = h.view();
  p.out = out.view();
  check(launch_expert_dispatch_fwd(p, nullptr));

  const auto hidden = [&](int64_t i, int64_t e, int64_t k) {
    const int64_t row = (c.shared ? 0 : e * r) + k;
    double sum = down_bias.get(0, row);
    for (int64_t d = 0; d < c.width; ++d) sum += x.get(i, d) * down.get(row, d);
    return sum;
  };
  Matrix a(t, n, inner), through(t, n, inner);  // the wanted ga, and 2 dout B where relu lets it
  for (int64_t i = 0; i < n; ++i)
    for (int64_t e = 0; e < e_all; ++e)
      for (int64_t k = 0; k < r; ++k) {
        const double value = chosen_by(i, e) ? hidden(i, e, k) : 0.0;
        double sum = 0;
        for (int64_t o = 0; o < c.outs; ++o) sum += 2 * dout.get(i, o) * up.get(o, e * r + k);
        a.set(i, e * r + k, static_cast<float>(value > 0 ? value : 0));
        through.set(i, e * r + k, static_cast<float>(value > 0 ? sum : 0));
      }
  expect(label + " out", out, [&](int64_t i, int64_t o) {
    double sum = 0;
    for (int64_t e = 0; e < e_all; ++e) sum += chosen_by(i, e) ? up_bias.get(e, o) : 0.0f;
    for (int64_t k = 0; k < inner; ++k) sum += a.get(i, k) * up.get(o, k);
    return 3 * h.get(i, o) + 2 * sum;
  });

  Matrix all_downs(t, inner, c.width, c.pad);
  for (int64_t k = 0; k < inner; ++k)
    for (int64_t d = 0; d < c.width; ++d) all_downs.set(k, d, down.get(c.shared ? k % r : k, d));
  const int64_t side_cols = c.sorted ? r : inner;
  Matrix dz(t, kept, side_cols), ga(t, kept, side_cols), dx(t, n, c.width, c.pad);
  Matrix dgates(f32, n, e_all), weights(f32, n, e_all);
  ExpertRowsParams b = {};
  b.f = p.f;
  b.f.down = all_downs.view();
  b.dout = dout.view();
  b.dz = dz.view();
  b.ga = ga.view();
  b.dx = dx.view();
  b.dgates = floats(dgates);
  b.gates = floats(weights);
  b.form_dz = true;
  b.by_slot = c.sorted;
  if (c.sorted) {
    check(launch_expert_dispatch_bwd_rows(b, nullptr));
    b.form_dz = b.by_slot = false;
  }
  b.form_dx = true;
  check(launch_expert_dispatch_bwd_rows(b, nullptr));
  expect(label + " dx", dx, [&](int64_t i, int64_t d) {
    double sum = 0;
    for (int64_t k = 0; k < inner; ++k) sum += through.get(i, k) * all_downs.get(k, d);
    return sum;
  });
  expect(label + " dgates", dgates, [&](int64_t i, int64_t e) {
    if (c.topk || !chosen_by(i, e)) return 0.0;  // a gate that is always 1
    double sum = 0;
    for (int64_t o = 0; o < c.outs; ++o) sum += 2 * dout.get(i, o) * up_bias.get(e, o);
    for (int64_t k = e * r; k < (e + 1) * r; ++k) sum += through.get(i, k) * a.get(i, k);
    return sum;
  });

  const int64_t splits = 3;
  std::vector<float> up_partial(splits * e_all * c.outs * r),
      down_partial(splits * e_all * c.width * r), sum_partial(splits * e_all * c.outs);
  ExpertWeightsParams w = {};
  w.dtype = t;
  w.rows = n;
  w.experts = c.experts;
  w.rank = c.rank;
  w.order = p.f.order;
  w.offsets = p.f.offsets;
  w.product[0] = {dout.view(), ga.view(), c.outs, up_partial.data()};
  w.product[1] = {x.view(), dz.view(), c.width, down_partial.data()};
  w.splits = splits;
  check(launch_expert_dispatch_bwd_weights(w, nullptr));
  ExpertSumsParams s = {};
  s.rows = n;
  s.experts = c.experts;
  s.offsets = p.f.offsets;
  s.jobs = 1;
  s.job[0] = {dout.view(), t, c.outs, floats(weights), sum_partial.data()};
  s.splits = splits;
  check(launch_expert_dispatch_bwd_sums(s, nullptr));
  Matrix dup(t, e_all * c.outs, r), ddown(f32, downs * r, c.width), dup_bias(f32, e_all, c.outs);
  ExpertReduceParams reduce = {};
  reduce.jobs = 3;
  reduce.job[0] = {up_partial.data(), splits, e_all * c.outs * r, c.outs * r, c.outs, r,
                   dup.memory.get(),  t,      c.outs * r,         r,          1,      2.0f,
                   c.experts};
  const int64_t each = c.width * r;
  reduce.job[1] = {down_partial.data(),
                   c.shared ? splits * e_all : splits,
                   c.shared ? each : e_all * each,
                   each,
                   c.width,
                   r,
                   ddown.memory.get(),
                   f32,
                   each,
                   1,
                   c.width,
                   1.0f,
                   static_cast<int32_t>(downs)};
  reduce.job[2] = {sum_partial.data(),
                   splits,
                   e_all * c.outs,
                   c.outs,
                   1,
                   c.outs,
                   dup_bias.memory.get(),
                   f32,
                   c.outs,
                   0,
                   1,
                   2.0f,
                   c.experts};
  check(launch_expert_dispatch_bwd_reduce(reduce, nullptr));
  const auto over_rows = [&](const std::function<double(int64_t)>& term) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += term(i);
    return sum;
  };
  expect(label + " dup", dup, [&](int64_t row, int64_t k) {
    const int64_t e = row / c.outs, o = row % c.outs;
    return over_rows([&](int64_t i) { return 2 * dout.get(i, o) * a.get(i, e * r + k); });
  });
  expect(label + " dup_bias", dup_bias, [&](int64_t e, int64_t o) {
    return over_rows([&](int64_t i) { return chosen_by(i, e) ? 2 * dout.get(i, o) : 0.0f; });
  });
  expect(label + " ddown", ddown, [&](int64_t k, int64_t d) {
    double sum = 0;
    for (int64_t from = k; from < inner; from += downs * r)
      sum += over_rows(
          [&](int64_t i) { return static_cast<double>(x.get(i, d)) * through.get(i, from); });
    return sum;
  });
}

}  // namespace

int main() {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    petal_emulation::settings().block_seed = static_cast<uint64_t>(dtype);
    petal_emulation::settings().thread_seed = static_cast<uint64_t>(dtype);
    for (bool sorted : {false, true}) {
      experts({dtype, 69, 6, 7, 0, 5, 3, sorted, false, false});
      experts({dtype, 70, 8, 72, 8, 3, 24, sorted, false, true});
      experts({dtype, 35, 9, 5, 3, 4, 7, sorted, true, false});
      experts({dtype, 35, 8, 8, 0, 64, 1, sorted, true, false});
    }
  }
  std::printf(failures == 0 ? "every kernel is right\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
