// frozen_norm's kernels on exact-size buffers under the sanitizers. Rows are plus and minus one about
// their mean, so that the deviation is one and every sum exact.
#include "driver.h"
#include "frozen_norm/cuda/params.h"

using namespace petal;

namespace {

void norm(DType dtype, int64_t rows, int64_t width, int64_t pad, bool centered, bool plus_one,
          bool has_weight) {
  const std::string label = "norm dtype " + std::to_string(static_cast<int>(dtype)) + " width " +
                            std::to_string(width) + (centered ? " layer" : " rms");
  Matrix x(dtype, rows, width, pad), dy(dtype, rows, width, pad);
  Matrix weight(dtype, 1, width), bias(dtype, 1, width);
  Matrix y(dtype, rows, width, pad), dx(dtype, rows, width, pad);
  Matrix moments(DType::kFloat32, rows, centered ? 2 : 1);
  dy.fill(1);
  weight.fill(2);
  bias.fill(3);
  const float mean = centered ? 1.0f : 0.0f;
  const auto xhat = [&](int64_t r, int64_t c) { return (r + c) % 2 ? 1.0f : -1.0f; };
  const auto factor = [&](int64_t c) {
    return has_weight ? weight.get(0, c) + (plus_one ? 1.0f : 0.0f) : 1.0f;
  };
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) x.set(r, c, mean + xhat(r, c));

  NormParams p = {};
  p.dtype = dtype;
  p.rows = rows;
  p.width = width;
  p.centered = centered;
  p.rounded = !centered && !plus_one;
  p.offset = plus_one ? 1.0f : 0.0f;
  p.x = x.view();
  if (has_weight) p.weight = weight.view();
  if (centered) p.bias = bias.view();
  p.moments = reinterpret_cast<float*>(moments.memory.get());
  p.y = y.view();
  check(launch_frozen_norm_fwd(p, nullptr));
  expect(label + " moments", moments,
         [](int64_t, int64_t) { return 1.0; });  // mean and 1 / deviation
  expect(label + " y", y, [&](int64_t r, int64_t c) {
    return xhat(r, c) * factor(c) + (centered ? bias.get(0, c) : 0.0f);
  });

  p.dy = dy.view();
  p.dx = dx.view();
  check(launch_frozen_norm_bwd(p, nullptr));
  expect(label + " dx", dx, [&](int64_t r, int64_t c) {
    float sum_g = 0.0f, sum_gx = 0.0f;
    for (int64_t k = 0; k < width; ++k) {
      const float g = dy.get(r, k) * factor(k);
      sum_g += g;
      sum_gx += g * xhat(r, k);
    }
    const float n = static_cast<float>(width);
    const float mean_g = centered ? sum_g / n : 0.0f;
    return dy.get(r, c) * factor(c) - xhat(r, c) * (sum_gx / n) - mean_g;
  });
}

}  // namespace

int main() {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    petal_emulation::settings().block_seed = static_cast<uint64_t>(dtype);
    petal_emulation::settings().thread_seed = static_cast<uint64_t>(dtype);
    norm(dtype, 7, 70, 3, true, false, true);  // a warp's row, nothing aligned
    norm(dtype, 5, 77, 0, false, false, true);
    norm(dtype, 6, 272, 8, false, true, true);   // 16-byte accesses, two steps of a warp
    norm(dtype, 2, 1030, 0, true, false, true);  // a block's row
    norm(dtype, 2, 2064, 0, false, true, true);
    norm(dtype, 3, 64, 0, false, false, false);
  }
  std::printf(failures == 0 ? "every kernel is right\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
