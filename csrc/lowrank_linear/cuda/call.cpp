// lowrank_linear on CUDA: checks, parameter structs and registration.
// Kernels: {forward,backward}.cu. These functions write into tensors their caller has allocated;
// they are called by ops/lowrank_linear/cuda_impl.py only.
#include "common/cuda/host.h"
#include "params.h"

namespace petal {
namespace {

using Tensors = std::vector<Tensor>;

void check_count(size_t count, const char* name) {
  STD_TORCH_CHECK(count >= 1 && count <= kMaxOutputs, name, ": want 1 to ", kMaxOutputs,
                  " outputs, got ", count);
}

void check_rank(int64_t rank, int64_t most, const char* name) {
  STD_TORCH_CHECK(rank >= 1 && rank <= most, name, ": want a rank from 1 to ", most, ", got ",
                  rank);
}

void check_same_dtype(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name,
                  ": want the dtype of the activations");
}

// A factor [width, R] as it lies in memory: either row-major, or the transposed view of a row-major
// [R, width].
MatrixView factor(const Tensor& tensor, int64_t width, int64_t rank, bool rank_columns,
                  const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == width && tensor.size(1) == rank, name,
                  ": want [", width, ", ", rank, "]");
  if (rank_columns) return matrix(tensor, width, rank, name);
  return matrix(torch::stable::transpose(tensor, 0, 1), rank, width, name);
}

// One that has a single row is in both layouts: all are looked at.
bool have_rank_columns(const Tensors& factors) {
  for (const Tensor& each : factors) {
    if (each.size(1) != 1 && each.stride(1) != 1) return false;
  }
  return true;
}

// out = scale * sum_k mask_k (drop(a_k) b_k), b_k = factors[k] as a [width_k, R] matrix in one of
// its two layouts, all in the same one.
void lowrank_linear_shrink(Tensors a, Tensors factors, Tensor out, MaybeTensor rng, double scale,
                           double dropout, bool mask_a, bool mask_out, bool separate, bool small) {
  check_count(a.size(), "lowrank_linear_shrink");
  STD_TORCH_CHECK(factors.size() == a.size(),
                  "lowrank_linear_shrink: want as many factors as inputs");
  ShrinkParams p = {};
  p.dtype = dtype_of(a[0], "lowrank_linear_shrink");
  p.rows = a[0].size(0);
  p.outputs = static_cast<int32_t>(a.size());
  p.rank = static_cast<int32_t>(factors[0].size(1));
  check_rank(p.rank, kMaxRank, "lowrank_linear_shrink");
  p.b_rank_rows = !have_rank_columns(factors);
  for (int k = 0; k < p.outputs; ++k) {
    check_same_dtype(a[k], a[0], "lowrank_linear_shrink");
    check_same_dtype(factors[k], a[0], "lowrank_linear_shrink: factor");
    p.widths[k] = a[k].size(1);
    p.a[k] = matrix(a[k], p.rows, p.widths[k], "lowrank_linear_shrink: input");
    p.b[k] =
        factor(factors[k], p.widths[k], p.rank, !p.b_rank_rows, "lowrank_linear_shrink: factor");
  }
  check_same_dtype(out, a[0], "lowrank_linear_shrink: out");
  p.separate = separate;
  p.out = matrix(out, p.rows, separate ? p.outputs * p.rank : p.rank, "lowrank_linear_shrink: out");
  // With separate outputs a 16-byte store must also start on a multiple of 16 bytes for every k.
  p.out.vec =
      p.out.vec && (!separate || p.rank * static_cast<int64_t>(out.element_size()) % 16 == 0);
  p.scale = static_cast<float>(scale);
  p.dropout = dropout_of(rng, dropout);
  p.mask_a = mask_a && p.dropout.rng != nullptr;
  p.mask_out = mask_out && p.dropout.rng != nullptr;
  p.small = small;
  const Device device(out);
  check_launch(launch_lowrank_shrink(p, device.stream()), "lowrank_linear_shrink");
}

ExpandParams expand_params(const Tensors& a, const Tensors& factors, const Tensors& bases,
                           const Tensors& outs, const MaybeTensor& rng, double scale,
                           double dropout, bool mask_a, bool mask_out, const char* name) {
  check_count(outs.size(), name);
  STD_TORCH_CHECK(factors.size() == outs.size() && (a.size() == outs.size() || a.size() == 1), name,
                  ": want as many factors as outputs");
  STD_TORCH_CHECK(bases.empty() || bases.size() == outs.size(), name,
                  ": want no base or one per output");
  STD_TORCH_CHECK(!mask_out || outs.size() == 1, name, ": a mask on the product wants one output");
  ExpandParams p = {};
  p.dtype = dtype_of(outs[0], name);
  p.rows = outs[0].size(0);
  p.outputs = static_cast<int32_t>(outs.size());
  p.rank = static_cast<int32_t>(factors[0].size(1));
  check_rank(p.rank, kMaxRank, name);
  p.b_rank_columns = have_rank_columns(factors);
  for (int k = 0; k < p.outputs; ++k) {
    const Tensor& hidden = a.size() == 1 ? a[0] : a[k];
    check_same_dtype(hidden, outs[0], name);
    check_same_dtype(factors[k], outs[0], name);
    check_same_dtype(outs[k], outs[0], name);
    p.widths[k] = outs[k].size(1);
    p.a[k] = matrix(hidden, p.rows, p.rank, name);
    p.b[k] = factor(factors[k], p.widths[k], p.rank, p.b_rank_columns, name);
    p.out[k] = matrix(outs[k], p.rows, p.widths[k], name);
    if (!bases.empty()) {
      check_same_dtype(bases[k], outs[0], name);
      p.base[k] = matrix(bases[k], p.rows, p.widths[k], name);
    }
  }
  p.scale = static_cast<float>(scale);
  p.dropout = dropout_of(rng, dropout);
  p.mask_a = mask_a && p.dropout.rng != nullptr;
  p.mask_out = mask_out && p.dropout.rng != nullptr;
  return p;
}

// outs[k] = bases[k] + scale * mask (drop_k(a_k) factors[k]^T); a: one for all outputs or one each;
// bases[k] may be outs[k].
void lowrank_linear_expand(Tensors a, Tensors factors, Tensors bases, Tensors outs, MaybeTensor rng,
                           double scale, double dropout, bool mask_a, bool mask_out) {
  const ExpandParams p = expand_params(a, factors, bases, outs, rng, scale, dropout, mask_a,
                                       mask_out, "lowrank_linear_expand");
  const Device device(outs[0]);
  check_launch(launch_lowrank_expand(p, device.stream()), "lowrank_linear_expand");
}

// hidden = drop(x) down^T, outs[k] = bases[k] + scale * drop_k(hidden) factors[k]^T, in one launch.
void lowrank_linear_fwd_update(Tensor x, Tensor down, Tensor hidden, Tensors factors, Tensors bases,
                               Tensors outs, MaybeTensor rng, double scale, double dropout,
                               bool mask_x, bool mask_hidden) {
  STD_TORCH_CHECK(!(mask_x && mask_hidden), "lowrank_linear_fwd_update: want one place of dropout");
  UpdateParams p = {};
  p.expand = expand_params({hidden}, factors, bases, outs, rng, scale, dropout, mask_hidden, false,
                           "lowrank_linear_fwd_update");
  check_rank(p.expand.rank, kMaxFusedRank, "lowrank_linear_fwd_update");
  check_same_dtype(x, hidden, "lowrank_linear_fwd_update: x");
  check_same_dtype(down, hidden, "lowrank_linear_fwd_update: down");
  p.depth = x.size(1);
  p.x = matrix(x, p.expand.rows, p.depth, "lowrank_linear_fwd_update: x");
  p.down = matrix(down, p.expand.rank, p.depth, "lowrank_linear_fwd_update: down");
  p.mask_x = mask_x && p.expand.dropout.rng != nullptr;
  const Device device(hidden);
  check_launch(launch_lowrank_update(p, device.stream()), "lowrank_linear_fwd_update");
}

// outs[j] = scales[j] * drop(bigs[j])^T drop(smalls[j]) as a [width_j, R] tensor of any strides.
// masks[j]: 0 none, 1 big (stream 0), 2 small (stream j). splits: 0 chooses.
void lowrank_linear_bwd_weights(Tensors bigs, Tensors smalls, Tensors outs, MaybeTensor rng,
                                std::vector<double> scales, double dropout,
                                std::vector<int64_t> masks, int64_t splits) {
  const size_t jobs = bigs.size();
  STD_TORCH_CHECK(jobs >= 1 && jobs <= kMaxJobs, "lowrank_linear_bwd_weights: want 1 to ", kMaxJobs,
                  " reductions, got ", jobs);
  STD_TORCH_CHECK(
      smalls.size() == jobs && outs.size() == jobs && scales.size() == jobs && masks.size() == jobs,
      "lowrank_linear_bwd_weights: want lists of one length");
  ParamGradParams p = {};
  p.dtype = dtype_of(bigs[0], "lowrank_linear_bwd_weights");
  p.rows = bigs[0].size(0);
  p.rank = static_cast<int32_t>(smalls[0].size(1));
  check_rank(p.rank, kMaxRank, "lowrank_linear_bwd_weights");
  p.jobs = static_cast<int32_t>(jobs);
  p.dropout = dropout_of(rng, dropout);
  int64_t widths[kMaxJobs], columns = 0;
  for (size_t j = 0; j < jobs; ++j) {
    ReduceJob& job = p.job[j];
    check_same_dtype(bigs[j], bigs[0], "lowrank_linear_bwd_weights");
    check_same_dtype(smalls[j], bigs[0], "lowrank_linear_bwd_weights");
    job.width = widths[j] = bigs[j].size(1);
    columns += job.width;
    job.big = matrix(bigs[j], p.rows, job.width, "lowrank_linear_bwd_weights: big");
    job.small = matrix(smalls[j], p.rows, p.rank, "lowrank_linear_bwd_weights: small");
    STD_TORCH_CHECK(outs[j].dim() == 2 && outs[j].size(0) == job.width && outs[j].size(1) == p.rank,
                    "lowrank_linear_bwd_weights: out: want [", job.width, ", ", p.rank, "]");
    job.mask_big = masks[j] == 1 && p.dropout.rng != nullptr;
    job.mask_small = masks[j] == 2 && p.dropout.rng != nullptr;
    job.stream = static_cast<uint32_t>(j);
    job.scale = static_cast<float>(scales[j]);
    job.out = outs[j].data_ptr();
    job.out_dtype = dtype_of(outs[j], "lowrank_linear_bwd_weights: out");
    job.out_stride_width = outs[j].stride(0);
    job.out_stride_rank = outs[j].stride(1);
  }
  const Device device(outs[0]);
  p.splits = splits > 0 ? splits : lowrank_splits(p.rows, widths, p.jobs, p.rank);
  Tensor partial =
      torch::stable::new_empty(outs[0], {p.splits, columns, p.rank}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.data_ptr());
  check_launch(launch_lowrank_param_grad(p, device.stream()), "lowrank_linear_bwd_weights");
}

}  // namespace
}  // namespace petal

PETAL_LIBRARY_FRAGMENT(PETAL_CUDA_LIBRARY, m) {
  m.def(
      "lowrank_linear_shrink(Tensor[] a, Tensor[] factors, Tensor(a!) out, Tensor? rng, float "
      "scale, "
      "float dropout, bool mask_a, bool mask_out, "
      "bool separate, bool small) -> ()");
  m.def(
      "lowrank_linear_expand(Tensor[] a, Tensor[] factors, Tensor[] bases, Tensor(a!)[] outs, "
      "Tensor? "
      "rng, float scale, float dropout, bool mask_a, "
      "bool mask_out) -> ()");
  m.def(
      "lowrank_linear_fwd_update(Tensor x, Tensor down, Tensor(a!) hidden, Tensor[] factors, "
      "Tensor[] bases, "
      "Tensor(b!)[] outs, Tensor? rng, float scale, "
      "float dropout, bool mask_x, bool mask_hidden) -> ()");
  m.def(
      "lowrank_linear_bwd_weights(Tensor[] bigs, Tensor[] smalls, Tensor(a!)[] outs, Tensor? rng, "
      "float[] "
      "scales, float dropout, int[] masks, int splits) "
      "-> ()");
}

PETAL_LIBRARY_IMPL(PETAL_CUDA_LIBRARY, PETAL_CUDA_KEY, m) {
  m.impl("lowrank_linear_shrink", TORCH_BOX(&petal::lowrank_linear_shrink));
  m.impl("lowrank_linear_expand", TORCH_BOX(&petal::lowrank_linear_expand));
  m.impl("lowrank_linear_fwd_update", TORCH_BOX(&petal::lowrank_linear_fwd_update));
  m.impl("lowrank_linear_bwd_weights", TORCH_BOX(&petal::lowrank_linear_bwd_weights));
}
