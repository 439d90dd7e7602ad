// Runs every kernel on small ragged problems under the address and undefined-behaviour sanitizers.
// Inputs are small integers, all sums are exact, and results are compared with equality.
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "driver.h"
#include "lowrank_linear/cuda/params.h"
#include "mode_contract/cuda/params.h"

using namespace petal;

namespace {

void lowrank(DType dtype, int64_t rows, int64_t depth, int64_t rank, int64_t pad, bool transposed,
             bool drop) {
  const int outputs = 2;
  const int64_t widths[] = {37, 71};
  const std::string label =
      "lowrank dtype " + std::to_string(static_cast<int>(dtype)) + " pad " + std::to_string(pad);
  Matrix x(dtype, rows, depth, pad), down(dtype, rank, depth, pad), h(dtype, rows, rank, pad);
  x.fill(0);
  down.fill(1);
  std::vector<Matrix> ups, bases, ys, dys;
  for (int k = 0; k < outputs; ++k) {
    ups.emplace_back(dtype, transposed ? rank : widths[k], transposed ? widths[k] : rank, pad);
    bases.emplace_back(dtype, rows, widths[k], pad);
    ys.emplace_back(dtype, rows, widths[k], pad);
    dys.emplace_back(dtype, rows, widths[k], pad);
    ups[k].fill(2 + k);
    bases[k].fill(4 + k);
    dys[k].fill(6 + k);
  }
  const auto up = [&](int k, int64_t o, int64_t r) {
    return transposed ? ups[k].get(r, o) : ups[k].get(o, r);
  };

  ShrinkParams shrink = {};
  shrink.dtype = dtype;
  shrink.rows = rows;
  shrink.ranks[0] = static_cast<int32_t>(rank);
  shrink.outputs = 1;
  shrink.a[0] = x.view();
  shrink.widths[0] = depth;
  shrink.b[0] = down.view();
  shrink.b_rank_rows = true;
  shrink.out = h.view();
  shrink.scales[0] = 1.0f;
  shrink.small = transposed;
  check(launch_lowrank_shrink(shrink, nullptr));
  const auto hidden = [&](int64_t r, int64_t c) {
    double sum = 0;
    for (int64_t d = 0; d < depth; ++d) sum += x.get(r, d) * down.get(c, d);
    return sum;
  };
  expect(label + " shrink", h, hidden);

  UpdateParams update = {};
  update.expand.dtype = dtype;
  update.expand.rows = rows;
  update.expand.outputs = outputs;
  update.expand.b_rank_columns = !transposed;
  update.expand.dropout = dropout(drop);
  update.expand.mask_a = drop;
  for (int k = 0; k < outputs; ++k) {
    update.expand.ranks[k] = static_cast<int32_t>(rank);
    update.expand.scales[k] = 1.0f;
    update.downs[k] = down.view();
    update.expand.a[k] = h.view();
    update.expand.b[k] = ups[k].view();
    update.expand.base[k] = bases[k].view();
    update.expand.out[k] = ys[k].view();
    update.expand.widths[k] = widths[k];
  }
  update.x = x.view();
  update.depth = depth;
  const auto expect_ys = [&](const std::string& what) {
    for (int k = 0; k < outputs; ++k)
      expect(label + what, ys[k], [&](int64_t r, int64_t o) {
        double sum = 0;
        for (int64_t c = 0; c < rank; ++c)
          sum += (drop ? 2 * kept(k, r, c) : 1) * h.get(r, c) * up(k, o, c);
        return bases[k].get(r, o) + sum;
      });
  };
  check(launch_lowrank_expand(update.expand, nullptr));
  expect_ys(" expand");
  if (rank <= kMaxFusedRank) {
    check(launch_lowrank_update(update, nullptr));
    expect(label + " update h", h, hidden);
    expect_ys(" update");
  }

  Matrix dh(dtype, rows, rank, pad);
  ShrinkParams back = {};
  back.dtype = dtype;
  back.rows = rows;
  back.outputs = outputs;
  back.b_rank_rows = transposed;
  back.out = dh.view();
  back.dropout = dropout(drop);
  back.mask_out = back.apart = drop;
  back.small = !transposed;
  for (int k = 0; k < outputs; ++k) {
    back.ranks[k] = static_cast<int32_t>(rank);
    back.scales[k] = 1.0f;
    back.a[k] = dys[k].view();
    back.widths[k] = widths[k];
    back.b[k] = ups[k].view();
  }
  check(launch_lowrank_shrink(back, nullptr));
  expect(label + " dh", dh, [&](int64_t r, int64_t c) {
    double sum = 0;
    for (int k = 0; k < outputs; ++k)
      for (int64_t o = 0; o < widths[k]; ++o)
        sum += (drop ? 2 * kept(k, r, c) : 1) * dys[k].get(r, o) * up(k, o, c);
    return sum;
  });

  ParamGradParams grads = {};
  grads.dtype = dtype;
  grads.rows = rows;
  grads.jobs = outputs + 1;
  grads.splits = 2;
  grads.dropout = dropout(drop);
  Matrix dup0(DType::kFloat32, widths[0], rank), dup1(dtype, rank, widths[1]),
      ddown(dtype, rank, depth);
  Matrix small(dtype, rows, rank, pad);
  small.fill(9);
  for (int j = 0; j <= outputs; ++j) {
    ReduceJob& job = grads.job[j];
    job.big = j < outputs ? dys[j].view() : x.view();
    job.small = small.view();
    job.width = j < outputs ? widths[j] : depth;
    job.mask_small = drop && j < outputs;
    job.mask_big = drop && j == outputs;
    job.rank = static_cast<int32_t>(rank);
    job.stream = j < outputs ? static_cast<uint32_t>(j) : 0;
    job.scale = 1.0f;
    job.out = j == 0 ? dup0.memory.get() : j == 1 ? dup1.memory.get() : ddown.memory.get();
    job.out_dtype = j == 0 ? DType::kFloat32 : dtype;
    job.out_stride_width = j == 0 ? rank : 1;
    job.out_stride_rank = j == 0 ? 1 : job.width;
  }
  plan_param_grad(grads);
  std::vector<float> partial(static_cast<size_t>(grads.splits * grads.partial_stride));
  grads.partial = partial.data();
  check(launch_lowrank_param_grad(grads, nullptr));
  const auto reduce = [&](const Matrix& big, int job, int64_t col, int64_t r) {
    double sum = 0;
    for (int64_t n = 0; n < rows; ++n) {
      const bool keep = job < outputs ? kept(job, n, r) : kept(0, n, col);
      sum += (drop ? 2 * keep : 1) * big.get(n, col) * small.get(n, r);
    }
    return sum;
  };
  expect(label + " dup0", dup0, [&](int64_t o, int64_t r) { return reduce(dys[0], 0, o, r); });
  expect(label + " dup1", dup1, [&](int64_t r, int64_t o) { return reduce(dys[1], 1, o, r); });
  expect(label + " ddown", ddown, [&](int64_t r, int64_t d) { return reduce(x, 2, d, r); });
}

void modes(DType dtype, int64_t count, int64_t rank, int64_t columns, bool diagonal) {
  const std::string label = std::string(diagonal ? "diagonal" : "tucker") + " dtype " +
                            std::to_string(static_cast<int>(dtype));
  Matrix core(dtype, diagonal ? 1 : rank * rank, rank), p(dtype, count, rank),
      up(dtype, columns, rank);
  Matrix out(DType::kFloat32, count * rank, columns), dout(dtype, count * rank, columns);
  Matrix dcore(dtype, core.rows, rank), dmodes(dtype, count, rank), dup(dtype, columns, rank);
  core.fill(0);
  p.fill(1);
  up.fill(2);
  dout.fill(3);
  ModeParams params = {};
  params.dtype = dtype;
  params.modes_count = count;
  params.rank = rank;
  params.columns = columns;
  params.core = core.view();
  params.modes = p.view();
  params.up = up.view();
  params.scale = 1.0f;
  params.out = out.memory.get();
  params.out_dtype = DType::kFloat32;
  params.out_vec = out.view().vec;
  check(diagonal ? launch_mode_diagonal_fwd(params, nullptr)
                 : launch_mode_contract_fwd(params, nullptr));
  const auto m = [&](int64_t k, int64_t a, int64_t b) {
    double sum = 0;
    if (diagonal) return a == b ? static_cast<double>(core.get(0, a) * p.get(k, a)) : 0.0;
    for (int64_t c = 0; c < rank; ++c) sum += core.get(a * rank + b, c) * p.get(k, c);
    return sum;
  };
  std::vector<double> dm(static_cast<size_t>(count * rank * rank));
  for (int64_t k = 0; k < count; ++k)
    for (int64_t a = 0; a < rank; ++a)
      for (int64_t b = 0; b < rank; ++b)
        for (int64_t o = 0; o < columns; ++o)
          dm[(k * rank + a) * rank + b] += dout.get(k * rank + a, o) * up.get(o, b);
  expect(label + " forward", out, [&](int64_t row, int64_t o) {
    double sum = 0;
    for (int64_t b = 0; b < rank; ++b) sum += up.get(o, b) * m(row / rank, row % rank, b);
    return sum;
  });
  params.dout = dout.view();
  params.dcore = dcore.memory.get();
  params.dmodes = dmodes.memory.get();
  params.dup = dup.memory.get();
  params.dcore_vec = dcore.view().vec;
  std::vector<float> modes_partial(static_cast<size_t>(rank * count * rank)),
      up_partial(static_cast<size_t>(3 * columns * rank));
  params.modes_partial = modes_partial.data();
  params.up_partial = up_partial.data();
  params.up_splits = 3;
  check(diagonal ? launch_mode_diagonal_bwd(params, nullptr)
                 : launch_mode_contract_bwd(params, nullptr));
  const auto dm_at = [&](int64_t k, int64_t a, int64_t b) { return dm[(k * rank + a) * rank + b]; };
  expect(label + " dcore", dcore, [&](int64_t row, int64_t c) {
    double sum = 0;
    for (int64_t k = 0; k < count; ++k)
      sum += (diagonal ? dm_at(k, c, c) : dm_at(k, row / rank, row % rank)) * p.get(k, c);
    return sum;
  });
  expect(label + " dmodes", dmodes, [&](int64_t k, int64_t c) {
    double sum = 0;
    if (diagonal) return dm_at(k, c, c) * core.get(0, c);
    for (int64_t row = 0; row < rank * rank; ++row)
      sum += dm_at(k, row / rank, row % rank) * core.get(row, c);
    return sum;
  });
  expect(label + " dup", dup, [&](int64_t o, int64_t b) {
    double sum = 0;
    for (int64_t row = 0; row < count * rank; ++row)
      sum += dout.get(row, o) * m(row / rank, row % rank, b);
    return sum;
  });
}

}  // namespace

int main() {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    petal_emulation::settings().block_seed = static_cast<uint64_t>(dtype);
    petal_emulation::settings().thread_seed = static_cast<uint64_t>(dtype);
    lowrank(dtype, 69, 75, 19, 0, false, true);   // nothing aligned
    lowrank(dtype, 69, 72, 24, 8, true, true);    // 16-byte copies, ragged tiles
    lowrank(dtype, 21, 40, 72, 0, false, false);  // two rank blocks
    modes(dtype, 5, 19, 67, false);
    modes(dtype, 66, 8, 72, false);
    modes(dtype, 5, 35, 67, true);
  }
  std::printf(failures == 0 ? "every kernel is right\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
