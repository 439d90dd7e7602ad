// gated_bottleneck's kernels under the address and undefined-behaviour sanitizers, as driver.cpp:
// exact-size buffers, small integers, exact sums. Gates with curves are asked for where they are
// exact (logits of 0), so that every path runs and still has one right answer.
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "driver.h"
#include "gated_bottleneck/cuda/params.h"

using namespace petal;

namespace {

struct Config {
  DType dtype;
  int64_t samples, length, width, outs, pad;
  int rank, gate_rank;
  Gate gate;
  Route route;
  bool drop, sees_output;
};

VectorView vector(const Matrix& m) {
  VectorView v;
  v.data = m.memory.get();
  v.stride = 1;
  v.wide = m.dtype == DType::kFloat32;
  return v;
}

float* floats(const Matrix& m) { return reinterpret_cast<float*>(m.memory.get()); }

// Y = H + relu(route(z)) U^T + b; the logits of every gate are 0: G is 1/2, 3/2 or 1.
void gated(const Config& c) {
  const int64_t rows = c.samples * c.length;
  const DType t = c.dtype, f32 = DType::kFloat32;
  const std::string label = "gated dtype " + std::to_string(static_cast<int>(t)) + " gate " +
                            std::to_string(static_cast<int>(c.gate)) + " rank " +
                            std::to_string(c.rank);
  const bool large = c.gate == Gate::kLarge;
  const bool row_gate = c.gate == Gate::kMiddleX || c.gate == Gate::kSmall;
  const int64_t rg = large ? c.gate_rank : 1;
  Matrix x(t, rows, c.width, c.pad), h(t, rows, c.outs, c.pad), gate_input(t, rows, c.outs, c.pad);
  Matrix down(t, c.rank, c.width, c.pad), up(t, c.outs, c.rank, c.pad);
  Matrix gate_down(t, rg, c.outs, c.pad), gate_up(t, c.outs, rg, c.pad);
  Matrix left(t, c.samples, c.rank), right(t, c.samples, c.rank);
  Matrix up_bias(f32, 1, c.outs), down_bias(t, 1, c.rank);
  Matrix zeros(f32, 1, 2 * c.outs), weight_a(f32, 1, c.rank);
  Matrix z(t, rows, c.rank, c.pad), zg(t, rows, rg, c.pad), out(t, rows, c.outs, c.pad);
  Matrix logits(f32, rows, 1), pooled(f32, c.samples, 1);
  unsigned salt = 0;
  for (Matrix* m :
       {&x, &h, &gate_input, &down, &up, &gate_down, &left, &up_bias, &down_bias, &right})
    m->fill(salt++);
  for (Matrix* m : {&gate_up, &zeros, &weight_a})
    for (int64_t r = 0; r < m->rows; ++r)
      for (int64_t k = 0; k < m->cols; ++k) m->set(r, k, 0.0f);

  GatedParams p = {};
  p.dtype = t;
  p.rows = rows;
  p.length = c.length;
  p.outs = c.outs;
  p.activation = Activation::kRelu;
  p.route = c.route;
  p.kind = c.gate;
  p.sees_output = row_gate && c.sees_output;
  p.adds_gate_input = true;
  p.weight_a = floats(weight_a);
  p.down = {x.view(), down.view(), z.view(), vector(down_bias), c.width, c.rank, true};
  if (large)
    p.gate = {gate_input.view(), gate_down.view(), zg.view(), {}, c.outs, c.gate_rank, true};
  p.route_relu = true;
  p.left = left.view();
  p.right = right.view();
  p.columns[kUpBias] = vector(up_bias);
  if (c.gate == Gate::kMiddleY) p.columns[kGateColumn] = vector(zeros);
  if (row_gate) p.columns[kInputWeight] = p.columns[kLogitHWeight] = vector(zeros);
  p.h = h.view();
  p.gate_input = p.residual = gate_input.view();
  p.up = up.view();
  p.gate_up = gate_up.view();
  p.scale = 2.0f;
  p.dropout = dropout(c.drop);
  p.logits = row_gate ? floats(logits) : nullptr;
  p.form_logits = row_gate;
  if (c.gate == Gate::kSmall) {
    check(launch_gated_bottleneck_fwd(p, nullptr));
    check(launch_gated_bottleneck_pool(
        {p.logits, 1, c.samples, c.length, nullptr, true, floats(pooled)}, nullptr));
    p.pooled = floats(pooled);
    p.down.form = p.form_logits = false;
  }
  p.out = out.view();
  check(launch_gated_bottleneck_fwd(p, nullptr));
  const auto hidden = [&](int64_t r, int64_t k) {
    double sum = down_bias.get(0, k);
    for (int64_t d = 0; d < c.width; ++d) sum += x.get(r, d) * down.get(k, d);
    return sum;
  };
  expect(label + " z", z, hidden);
  const auto routed = [&](int64_t r, int64_t k) {
    const int64_t b = r / c.length;
    if (c.route == Route::kProduct) {
      double sum = 0;
      for (int64_t j = 0; j < c.rank; ++j)
        sum += z.get(r, j) > 0 ? z.get(r, j) * left.get(b, j) : 0;
      return sum * right.get(b, k);
    }
    const double by = left.get(b, k), v = z.get(r, k);
    return c.route == Route::kMul ? v * by : c.route == Route::kAdd ? v + by : v;
  };
  Matrix a(t, rows, c.rank), y(f32, rows, c.outs);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < c.rank; ++k)
      a.set(r, k, static_cast<float>(routed(r, k) > 0 ? routed(r, k) : 0));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < c.outs; ++o) {
      double sum = h.get(r, o) + up_bias.get(0, o);
      for (int64_t k = 0; k < c.rank; ++k) sum += a.get(r, k) * up.get(o, k);
      y.set(r, o, static_cast<float>(sum));
    }
  const double gate = c.gate == Gate::kNone ? 1.0 : c.gate == Gate::kMiddleY ? 1.5 : 0.5;
  const auto keep = [&](int64_t r, int64_t o) { return c.drop ? 2.0 * kept(0, r, o) : 1.0; };
  expect(label + " out", out, [&](int64_t r, int64_t o) {
    return gate_input.get(r, o) + 2 * gate * keep(r, o) * y.get(r, o);
  });

  if (c.route == Route::kProduct) return;  // backward's product is the library's
  // Backward, of a random dout: dY = 2 G keep dout; every logit's gradient multiplies zeros.
  Matrix dout(t, rows, c.outs, c.pad), sums(f32, rows, kRowSums), totals(f32, c.samples, 1);
  Matrix kept_a(t, rows, c.rank, c.pad), kept_ag(t, rows, rg, c.pad), dz(t, rows, c.rank, c.pad);
  Matrix dzg(t, rows, rg, c.pad), dq(t, rows, c.rank, c.pad), dh(t, rows, c.outs, c.pad);
  Matrix dx(t, rows, c.width, c.pad), dgate_input(t, rows, c.outs, c.pad);
  dout.fill(20);
  p.down.form = p.gate.form = false;
  GatedRowsParams b = {};
  b.f = p;
  b.f.pooled = c.gate == Gate::kSmall ? floats(pooled) : nullptr;
  b.dout = dout.view();
  b.sums = row_gate ? floats(sums) : nullptr;
  b.a = kept_a.view();
  b.dz = dz.view();
  b.dq = dq.view();
  b.dh = dh.view();
  b.dx = dx.view();
  b.dgate_input = dgate_input.view();
  if (large) b.ag = kept_ag.view(), b.dzg = dzg.view();
  b.need_dz = true;
  b.need_dzg = large;
  b.form_sums = row_gate;
  b.form_columns = c.gate != Gate::kSmall;
  check(launch_gated_bottleneck_bwd_rows(b, nullptr));
  if (c.gate == Gate::kSmall) {
    check(launch_gated_bottleneck_pool(
        {b.sums + 2, kRowSums, c.samples, c.length, nullptr, false, floats(totals)}, nullptr));
    b.totals = floats(totals);
    b.form_sums = false;
    b.form_columns = true;
    check(launch_gated_bottleneck_bwd_rows(b, nullptr));
  }
  const auto dy = [&](int64_t r, int64_t o) { return 2 * gate * keep(r, o) * dout.get(r, o); };
  expect(label + " a", kept_a, [&](int64_t r, int64_t k) { return a.get(r, k); });
  expect(label + " dh", dh, dy);
  expect(label + " dgate_input", dgate_input, [&](int64_t r, int64_t o) { return dout.get(r, o); });
  const auto through = [&](int64_t r, int64_t k) {
    double sum = 0;
    for (int64_t o = 0; o < c.outs; ++o) sum += dy(r, o) * up.get(o, k);
    return routed(r, k) > 0 ? sum : 0.0;
  };
  expect(label + " dq", dq, through);
  expect(label + " dz", dz, [&](int64_t r, int64_t k) {
    return through(r, k) * (c.route == Route::kMul ? left.get(r / c.length, k) : 1.0f);
  });
  expect(label + " dx", dx, [&](int64_t r, int64_t d) {
    double sum = 0;
    for (int64_t k = 0; k < c.rank; ++k) sum += dz.get(r, k) * down.get(k, d);
    return sum;
  });

  const int64_t splits = 3;
  std::vector<float> partial_up(splits * c.outs * c.rank), partial_gate_up(splits * c.outs * rg),
      partial_sums(splits * c.outs * kColumnSums), partial_down(splits * c.width * c.rank);
  Matrix dup(t, c.outs, c.rank), dup_bias(f32, 1, c.outs), ddown(f32, c.rank, c.width);
  GatedWeightsParams w = {};
  w.f = b.f;
  w.dout = dout.view();
  w.sums = b.sums;
  w.a = kept_a.view();
  w.ag = kept_ag.view();
  w.need_up = true;
  w.need_gate_up = large;
  w.wanted = (1u << kColumnSums) - 1;
  w.partial_up = partial_up.data();
  w.partial_gate_up = partial_gate_up.data();
  w.partial_sums = partial_sums.data();
  w.down[0] = {x.view(), dz.view(), c.width, c.rank, partial_down.data()};
  w.splits = splits;
  check(launch_gated_bottleneck_bwd_weights(w, nullptr));
  GatedReduceParams reduce_all = {};
  reduce_all.splits = splits;
  reduce_all.jobs = 3;
  reduce_all.job[0] = {
      partial_up.data(), c.outs * c.rank, c.outs, c.rank, dup.memory.get(), t, c.rank, 1};
  reduce_all.job[1] = {partial_sums.data() + kSumUpBias * c.outs,
                       c.outs * kColumnSums,
                       1,
                       c.outs,
                       dup_bias.memory.get(),
                       f32,
                       0,
                       1};
  reduce_all.job[2] = {
      partial_down.data(), c.width * c.rank, c.width, c.rank, ddown.memory.get(), f32, 1, c.width};
  check(launch_gated_bottleneck_bwd_reduce(reduce_all, nullptr));
  const auto over_rows = [&](const std::function<double(int64_t)>& term) {
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += term(r);
    return sum;
  };
  expect(label + " dup", dup, [&](int64_t o, int64_t k) {
    return over_rows([&](int64_t r) { return dy(r, o) * a.get(r, k); });
  });
  expect(label + " dup_bias", dup_bias,
         [&](int64_t, int64_t o) { return over_rows([&](int64_t r) { return dy(r, o); }); });
  expect(label + " ddown", ddown, [&](int64_t k, int64_t d) {
    return over_rows([&](int64_t r) { return static_cast<double>(x.get(r, d)) * dz.get(r, k); });
  });
}

}  // namespace

int main() {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    petal_emulation::settings().block_seed = static_cast<uint64_t>(dtype);
    petal_emulation::settings().thread_seed = static_cast<uint64_t>(dtype);
    gated({dtype, 3, 23, 5, 70, 0, 3, 0, Gate::kNone, Route::kMul, true, false});
    gated({dtype, 1, 69, 6, 67, 0, 5, 7, Gate::kLarge, Route::kNone, true, false});
    gated({dtype, 3, 23, 8, 72, 8, 4, 70, Gate::kLarge, Route::kAdd, false, false});
    gated({dtype, 3, 23, 5, 37, 0, 3, 0, Gate::kMiddleX, Route::kNone, true, true});
    gated({dtype, 1, 35, 5, 37, 3, 3, 0, Gate::kMiddleY, Route::kNone, false, false});
    gated({dtype, 5, 7, 8, 40, 8, 4, 0, Gate::kSmall, Route::kMul, true, false});
    gated({dtype, 5, 7, 8, 40, 3, 6, 0, Gate::kSmall, Route::kProduct, true, true});
    gated({dtype, 2, 17, 5, 37, 0, 70, 3, Gate::kLarge, Route::kProduct, false, false});
    gated({dtype, 1, 33, 3, 37, 0, 3, 140, Gate::kLarge, Route::kNone, false, false});
  }
  std::printf(failures == 0 ? "every kernel is right\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
