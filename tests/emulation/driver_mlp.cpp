// gated_mlp's kernels under the address and undefined-behaviour sanitizers, as driver.cpp:
// exact-size buffers, small integers, exact sums; the activation is relu.
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "driver.h"
#include "gated_mlp/cuda/params.h"

using namespace petal;

namespace {

struct Mlp {
  DType dtype;
  int64_t rows, width, rank, pad;
  bool gated, drop;
  std::string label;
  Matrix g, u, dh;

  Mlp(DType dtype_, int64_t rows_, int64_t width_, int64_t rank_, int64_t pad_, bool gated_,
      bool drop_)
      : dtype(dtype_),
        rows(rows_),
        width(width_),
        rank(rank_),
        pad(pad_),
        gated(gated_),
        drop(drop_),
        g(dtype_, rows_, width_, pad_),
        u(dtype_, rows_, width_, pad_),
        dh(dtype_, rows_, rank_, pad_) {
    label = "mlp dtype " + std::to_string(static_cast<int>(dtype)) + " rank " +
            std::to_string(rank) + (gated ? " gated" : " plain");
    g.fill(0);
    u.fill(1);
    dh.fill(3);
  }
  float factor(int64_t r, int64_t c) const { return gated ? u.get(r, c) : 1.0f; }
  float act(int64_t r, int64_t c) const { return g.get(r, c) > 0 ? g.get(r, c) : 0.0f; }
  MlpParams params() const {
    MlpParams p = {};
    p.dtype = dtype;
    p.activation = Activation::kRelu;
    p.rows = rows;
    p.width = width;
    p.g = g.view();
    if (gated) p.u = u.view();
    return p;
  }
};

void forward(const Mlp& m) {
  Matrix p(m.dtype, m.rows, m.width, m.pad);
  MlpParams params = m.params();
  params.p = p.view();
  check(launch_gated_mlp_act_fwd(params, nullptr));
  expect(m.label + " p", p, [&](int64_t r, int64_t c) { return m.act(r, c) * m.factor(r, c); });
}

void backward(const Mlp& m, bool rows_wanted, bool down_wanted) {
  Matrix upstream(m.dtype, m.rows, m.width), dp(m.dtype, m.rows, m.width, m.pad);
  Matrix du(m.dtype, m.rows, m.width, m.pad), ddown(m.dtype, m.rank, m.width);
  std::vector<float> partial(static_cast<size_t>(2 * m.width * m.rank));
  upstream.fill(2);
  dp.fill(2);
  MlpParams params = m.params();
  if (rows_wanted) {
    params.dp = dp.view();
    if (m.gated) params.du = du.view();
  }
  if (down_wanted) {
    params.rank = m.rank;
    params.dh = m.dh.view();
    params.dropout = dropout(m.drop);
    params.ddown = ddown.memory.get();
    params.ddown_dtype = m.dtype;
    params.splits = 2;
    params.partial = partial.data();
  }
  check(launch_gated_mlp_act_bwd(params, nullptr));
  if (rows_wanted) {
    expect(m.label + " dg", dp, [&](int64_t r, int64_t c) {
      return m.g.get(r, c) > 0 ? m.factor(r, c) * upstream.get(r, c) : 0.0;
    });
    if (m.gated)
      expect(m.label + " du", du,
             [&](int64_t r, int64_t c) { return m.act(r, c) * upstream.get(r, c); });
  }
  if (!down_wanted) return;
  expect(m.label + " ddown", ddown, [&](int64_t k, int64_t c) {
    double sum = 0;
    for (int64_t r = 0; r < m.rows; ++r)
      sum += m.dh.get(r, k) * (m.drop ? 2 * kept(0, r, c) : 1) * m.act(r, c) * m.factor(r, c);
    return sum;
  });
}

void mlp(const Mlp& m) {
  forward(m);
  backward(m, true, true);
  backward(m, true, false);
  backward(m, false, true);
}

}  // namespace

int main() {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    petal_emulation::settings().block_seed = static_cast<uint64_t>(dtype);
    petal_emulation::settings().thread_seed = static_cast<uint64_t>(dtype);
    mlp({dtype, 77, 131, 19, 0, true, true});   // nothing aligned
    mlp({dtype, 70, 136, 24, 8, true, false});  // 16-byte accesses, ragged tiles
    mlp({dtype, 37, 67, 70, 3, false, true});   // two tiles of ranks
  }
  std::printf(failures == 0 ? "every kernel is right\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
