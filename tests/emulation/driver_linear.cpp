// lowrank_linear with a down-projection, a mask and a scale of every output's own, under the
// address and undefined-behaviour sanitizers: as in driver.cpp, sums of small integers.
#include <string>
#include <vector>

#include "driver.h"
#include "lowrank_linear/cuda/params.h"

using namespace petal;

namespace {

constexpr int kOutputs = 3;
constexpr float kScales[] = {1.0f, -2.0f, 0.5f};

struct Own {
  DType dtype;
  int64_t rows, depth;
  std::vector<int64_t> ranks, widths, offsets;
  bool drop, small;
  std::string label;
  Matrix x, h;  // h: the outputs' parts side by side
  std::vector<Matrix> downs, ups, ys, dys;

  Own(DType dtype_, int64_t rows_, int64_t depth_, std::vector<int64_t> ranks_, int64_t pad,
      bool drop_, bool small_)
      : dtype(dtype_),
        rows(rows_),
        depth(depth_),
        ranks(ranks_),
        widths{37, 71, 16},
        offsets{0, ranks_[0], ranks_[0] + ranks_[1]},
        drop(drop_),
        small(small_),
        label("own dtype " + std::to_string(static_cast<int>(dtype_)) + " pad " +
              std::to_string(pad)),
        x(dtype_, rows_, depth_, pad),
        h(dtype_, rows_, offsets[2] + ranks_[2], pad) {
    x.fill(0);
    for (int k = 0; k < kOutputs; ++k) {
      downs.emplace_back(dtype, ranks[k], depth, pad);
      ups.emplace_back(dtype, widths[k], ranks[k], pad);
      ys.emplace_back(dtype, rows, widths[k], pad);
      dys.emplace_back(dtype, rows, widths[k], pad);
      downs[k].fill(1 + k);
      ups[k].fill(4 + k);
      dys[k].fill(7 + k);
    }
  }
  // The columns of output k.
  MatrixView part(int k) const {
    MatrixView view = h.view();
    view.data = static_cast<unsigned char*>(view.data) + offsets[k] * size_of(dtype);
    view.vec = can_vectorise(view.data, view.stride, static_cast<int64_t>(size_of(dtype)));
    return view;
  }
  bool aligned() const { return h.view().vec && part(1).vec && part(2).vec; }
  double keep(int k, int64_t row, int64_t col) const { return drop ? 2 * kept(k, row, col) : 1; }
  // Which output a column of h is of.
  int output(int64_t col) const { return col < offsets[1] ? 0 : col < offsets[2] ? 1 : 2; }
  double hidden(int64_t row, int64_t col) const {
    const int k = output(col);
    double sum = 0;
    for (int64_t d = 0; d < depth; ++d)
      sum += keep(k, row, d) * x.get(row, d) * downs[k].get(col - offsets[k], d);
    return sum;
  }
};

void shrink(const Own& own) {
  ShrinkParams p = {};
  p.dtype = own.dtype;
  p.rows = own.rows;
  p.outputs = kOutputs;
  p.own = p.b_rank_rows = true;
  p.out = own.h.view();
  p.out.vec = own.aligned();
  p.dropout = dropout(own.drop);
  p.mask_a = own.drop;
  p.small = own.small;
  p.a[0] = own.x.view();
  p.widths[0] = own.depth;
  for (int k = 0; k < kOutputs; ++k) {
    p.ranks[k] = static_cast<int32_t>(own.ranks[k]);
    p.offsets[k] = static_cast<int32_t>(own.offsets[k]);
    p.scales[k] = 1.0f;
    p.b[k] = own.downs[k].view();
  }
  check(launch_lowrank_shrink(p, nullptr));
  expect(own.label + " shrink", own.h, [&](int64_t r, int64_t c) { return own.hidden(r, c); });
}

void update(const Own& own) {
  UpdateParams p = {};
  p.expand.dtype = own.dtype;
  p.expand.rows = own.rows;
  p.expand.outputs = kOutputs;
  p.expand.b_rank_columns = true;
  p.expand.dropout = dropout(own.drop);
  p.x = own.x.view();
  p.depth = own.depth;
  p.own = true;
  p.mask_x = own.drop;
  for (int k = 0; k < kOutputs; ++k) {
    p.expand.ranks[k] = static_cast<int32_t>(own.ranks[k]);
    p.expand.scales[k] = kScales[k];
    p.expand.a[k] = own.part(k);
    p.expand.b[k] = own.ups[k].view();
    p.expand.out[k] = own.ys[k].view();
    p.expand.widths[k] = own.widths[k];
    p.downs[k] = own.downs[k].view();
  }
  check(launch_lowrank_update(p, nullptr));
  expect(own.label + " update h", own.h, [&](int64_t r, int64_t c) { return own.hidden(r, c); });
  for (int k = 0; k < kOutputs; ++k)
    expect(own.label + " update", own.ys[k], [&](int64_t r, int64_t o) {
      double sum = 0;
      for (int64_t c = 0; c < own.ranks[k]; ++c)
        sum += own.h.get(r, own.offsets[k] + c) * own.ups[k].get(o, c);
      return kScales[k] * sum;
    });
}

void hidden_gradient(const Own& own) {
  ShrinkParams p = {};
  p.dtype = own.dtype;
  p.rows = own.rows;
  p.outputs = kOutputs;
  p.separate = true;
  p.out = own.h.view();
  p.out.vec = own.aligned();
  p.dropout = dropout(own.drop);
  p.mask_out = own.drop;
  p.small = !own.small;
  for (int k = 0; k < kOutputs; ++k) {
    p.a[k] = own.dys[k].view();
    p.widths[k] = own.widths[k];
    p.b[k] = own.ups[k].view();
    p.ranks[k] = static_cast<int32_t>(own.ranks[k]);
    p.offsets[k] = static_cast<int32_t>(own.offsets[k]);
    p.scales[k] = kScales[k];
  }
  check(launch_lowrank_shrink(p, nullptr));
  expect(own.label + " dh", own.h, [&](int64_t r, int64_t c) {
    const int k = own.output(c);
    double sum = 0;
    for (int64_t o = 0; o < own.widths[k]; ++o)
      sum += own.dys[k].get(r, o) * own.ups[k].get(o, c - own.offsets[k]);
    return kScales[k] * own.keep(k, r, c - own.offsets[k]) * sum;
  });
}

// What is in h is dh here, of integers as small as the inputs'.
void input_gradient(const Own& own, int64_t pad) {
  Matrix dx(own.dtype, own.rows, own.depth, pad), base(own.dtype, own.rows, own.depth, pad);
  base.fill(10);
  ExpandParams p = {};
  p.dtype = own.dtype;
  p.rows = own.rows;
  p.outputs = 1;
  p.terms = kOutputs;
  p.base[0] = base.view();
  p.out[0] = dx.view();
  p.widths[0] = own.depth;
  p.scales[0] = 1.0f;
  p.dropout = dropout(own.drop);
  p.mask_out = own.drop;
  for (int k = 0; k < kOutputs; ++k) {
    p.ranks[k] = static_cast<int32_t>(own.ranks[k]);
    p.a[k] = own.part(k);
    p.b[k] = own.downs[k].view();
  }
  check(launch_lowrank_expand(p, nullptr));
  expect(own.label + " dx", dx, [&](int64_t r, int64_t d) {
    double total = base.get(r, d);
    for (int k = 0; k < kOutputs; ++k) {
      double sum = 0;
      for (int64_t c = 0; c < own.ranks[k]; ++c)
        sum += own.h.get(r, own.offsets[k] + c) * own.downs[k].get(c, d);
      total += own.keep(k, r, d) * sum;
    }
    return total;
  });
}

void weight_gradients(const Own& own) {
  ParamGradParams p = {};
  p.dtype = own.dtype;
  p.rows = own.rows;
  p.jobs = kOutputs;
  p.splits = 2;
  p.dropout = dropout(own.drop);
  std::vector<Matrix> outs;
  for (int k = 0; k < kOutputs; ++k) {
    outs.emplace_back(k == 1 ? DType::kFloat32 : own.dtype, own.ranks[k], own.depth);
    ReduceJob& job = p.job[k];
    job.big = own.x.view();
    job.small = own.part(k);
    job.width = own.depth;
    job.rank = static_cast<int32_t>(own.ranks[k]);
    job.mask_big = own.drop;
    job.stream = static_cast<uint32_t>(k);
    job.scale = 1.0f;
    job.out = outs[k].memory.get();
    job.out_dtype = outs[k].dtype;
    job.out_stride_width = 1;
    job.out_stride_rank = own.depth;
  }
  plan_param_grad(p);
  std::vector<float> partial(static_cast<size_t>(p.splits * p.partial_stride));
  p.partial = partial.data();
  check(launch_lowrank_param_grad(p, nullptr));
  for (int k = 0; k < kOutputs; ++k)
    expect(own.label + " ddown", outs[k], [&](int64_t c, int64_t d) {
      double sum = 0;
      for (int64_t r = 0; r < own.rows; ++r)
        sum += own.keep(k, r, d) * own.x.get(r, d) * own.h.get(r, own.offsets[k] + c);
      return sum;
    });
}

void all(DType dtype, int64_t rows, int64_t depth, std::vector<int64_t> ranks, int64_t pad,
         bool drop, bool small) {
  Own own(dtype, rows, depth, ranks, pad, drop, small);
  shrink(own);
  update(own);
  hidden_gradient(own);
  own.h.fill(5);
  input_gradient(own, pad);
  weight_gradients(own);
}

}  // namespace

int main() {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    petal_emulation::settings().block_seed = static_cast<uint64_t>(dtype);
    petal_emulation::settings().thread_seed = static_cast<uint64_t>(dtype);
    all(dtype, 69, 75, {19, 3, 40}, 0, true, false);  // nothing aligned, two tiles of ranks
    all(dtype, 69, 72, {16, 8, 24}, 8, true, true);   // 16-byte copies and stores
    all(dtype, 21, 40, {1, 9, 16}, 0, false, false);
  }
  std::printf(failures == 0 ? "every kernel is right\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
