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

void mlp(DType dtype, int64_t rows, int64_t width, int64_t rank, int64_t pad, bool gated,
         bool drop) {
  const std::string label = "mlp dtype " + std::to_string(static_cast<int>(dtype)) + " rank " +
                            std::to_string(rank) + (gated ? " gated" : " plain");
  Matrix g(dtype, rows, width, pad), u(dtype, rows, width, pad), dp(dtype, rows, width, pad);
  Matrix dh(dtype, rows, rank, pad), p(dtype, rows, width, pad);
  g.fill(0);
  u.fill(1);
  dh.fill(3);
  const auto factor = [&](int64_t r, int64_t c) { return gated ? u.get(r, c) : 1.0f; };
  const auto act = [&](int64_t r, int64_t c) { return g.get(r, c) > 0 ? g.get(r, c) : 0.0f; };

  MlpParams params = {};
  params.dtype = dtype;
  params.activation = Activation::kRelu;
  params.rows = rows;
  params.width = width;
  params.g = g.view();
  if (gated) params.u = u.view();
  params.p = p.view();
  check(launch_gated_mlp_act_fwd(params, nullptr));
  const auto product = [&](int64_t r, int64_t c) -> double { return act(r, c) * factor(r, c); };
  expect(label + " p", p, product);

  Matrix upstream(dtype, rows, width);
  upstream.fill(2);
  const auto backward = [&](bool rows_wanted, bool down_wanted) {
    Matrix du(dtype, rows, width, pad), ddown(dtype, rank, width);
    std::vector<float> partial(static_cast<size_t>(2 * width * rank));
    dp.fill(2);
    MlpParams back = params;
    if (rows_wanted) {
      back.dp = dp.view();
      if (gated) back.du = du.view();
    }
    if (down_wanted) {
      back.rank = rank;
      back.dh = dh.view();
      back.dropout = dropout(drop);
      back.ddown = ddown.memory.get();
      back.ddown_dtype = dtype;
      back.splits = 2;
      back.partial = partial.data();
    }
    check(launch_gated_mlp_act_bwd(back, nullptr));
    if (rows_wanted) {
      expect(label + " dg", dp, [&](int64_t r, int64_t c) {
        return g.get(r, c) > 0 ? factor(r, c) * upstream.get(r, c) : 0.0;
      });
      if (gated)
        expect(label + " du", du,
               [&](int64_t r, int64_t c) { return act(r, c) * upstream.get(r, c); });
    }
    if (!down_wanted) return;
    expect(label + " ddown", ddown, [&](int64_t k, int64_t c) {
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r)
        sum += dh.get(r, k) * (drop ? 2 * kept(0, r, c) : 1) * product(r, c);
      return sum;
    });
  };
  backward(true, true);
  backward(true, false);
  backward(false, true);
}

}  // namespace

int main() {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    petal_emulation::settings().block_seed = static_cast<uint64_t>(dtype);
    petal_emulation::settings().thread_seed = static_cast<uint64_t>(dtype);
    mlp(dtype, 77, 131, 19, 0, true, true);   // nothing aligned
    mlp(dtype, 70, 136, 24, 8, true, false);  // 16-byte accesses, ragged tiles
    mlp(dtype, 37, 67, 70, 3, false, true);   // two tiles of ranks
  }
  std::printf(failures == 0 ? "every kernel is right\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
