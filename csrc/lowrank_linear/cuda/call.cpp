// lowrank_linear on CUDA: checks, parameter structs and registration.
// Kernels: {shrink,forward,weights}.cu. These functions write into tensors their caller has allocated;
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

// One scale for each of `count` results.
void fill_scales(float (&to)[kMaxOutputs], const std::vector<double>& from, size_t count,
                 const char* name) {
  STD_TORCH_CHECK(from.size() == count, name, ": want ", count, " scales, got ", from.size());
  for (size_t k = 0; k < count; ++k) to[k] = static_cast<float>(from[k]);
}

// The rank of every factor; all the same where it is one bottleneck.
void fill_ranks(int32_t (&to)[kMaxOutputs], const Tensors& factors, bool same, const char* name) {
  for (size_t k = 0; k < factors.size(); ++k) {
    STD_TORCH_CHECK(factors[k].dim() == 2, name, ": factor: want 2 dimensions, got ",
                    factors[k].dim());
    const int64_t rank = factors[k].size(1);
    check_rank(rank, kMaxRank, name);
    to[k] = static_cast<int32_t>(rank);
    STD_TORCH_CHECK(!same || to[k] == to[0], name, ": want factors of one rank, got ", to[0],
                    " and ", rank);
  }
}

// The terms scale_k * mask_k (drop(a_k) b_k^T), b_k = factors[k] as a [width_k, R_k] matrix in one
// of its two layouts, all in the same one: their sum, or (separate) each in columns of its own. With
// one a and several factors (rows of R_k in memory) the terms are separate, and drop is their own.
void lowrank_linear_shrink(Tensors a, Tensors factors, Tensor out, MaybeTensor rng,
                           std::vector<double> scales, double dropout, bool mask_a, bool mask_out,
                           bool separate, bool small) {
  const char* const name = "lowrank_linear_shrink";
  check_count(factors.size(), name);
  STD_TORCH_CHECK(a.size() == factors.size() || a.size() == 1, name,
                  ": want as many factors as inputs, or one input");
  ShrinkParams p = {};
  p.dtype = dtype_of(a[0], name);
  p.rows = a[0].size(0);
  p.outputs = static_cast<int32_t>(factors.size());
  p.own = factors.size() > a.size();
  p.separate = separate && !p.own;
  fill_ranks(p.ranks, factors, !p.own && !separate, name);
  fill_scales(p.scales, scales, factors.size(), name);
  p.b_rank_rows = p.own || !have_rank_columns(factors);
  // With separate terms a 16-byte store must also start on a multiple of 16 bytes for every k.
  bool aligned = true, differ = false;
  int32_t columns = p.ranks[0];
  for (int k = 0; k < p.outputs; ++k) {
    const Tensor& input = p.own ? a[0] : a[k];
    check_same_dtype(input, a[0], name);
    check_same_dtype(factors[k], a[0], "lowrank_linear_shrink: factor");
    p.widths[k] = input.size(1);
    p.a[k] = matrix(input, p.rows, p.widths[k], "lowrank_linear_shrink: input");
    p.b[k] = factor(factors[k], p.widths[k], p.ranks[k], !p.b_rank_rows,
                    "lowrank_linear_shrink: factor");
    if (k > 0 && (p.own || separate)) {
      p.offsets[k] = columns;
      columns += p.ranks[k];
    }
    aligned = aligned && p.offsets[k] * static_cast<int64_t>(out.element_size()) % 16 == 0;
    differ = differ || p.scales[k] != p.scales[0];
  }
  check_same_dtype(out, a[0], "lowrank_linear_shrink: out");
  p.out = matrix(out, p.rows, columns, "lowrank_linear_shrink: out");
  p.out.vec = p.out.vec && aligned;
  p.dropout = dropout_of(rng, dropout);
  p.mask_a = mask_a && p.dropout.rng != nullptr;
  p.mask_out = mask_out && p.dropout.rng != nullptr;
  p.apart = p.outputs > 1 && !p.own && !separate && (p.mask_out || differ);
  p.small = small;
  const Device device(out);
  check_launch(launch_lowrank_shrink(p, device.stream()), name);
}

ExpandParams expand_params(const Tensors& a, const Tensors& factors, const Tensors& bases,
                           const Tensors& outs, const MaybeTensor& rng,
                           const std::vector<double>& scales, double dropout, bool mask_a,
                           bool mask_out, const char* name) {
  check_count(outs.size(), name);
  check_count(factors.size(), name);
  const bool terms = outs.size() == 1 && factors.size() > 1;
  STD_TORCH_CHECK(terms || factors.size() == outs.size(), name,
                  ": want as many factors as outputs, or one output");
  STD_TORCH_CHECK(a.size() == factors.size() || (a.size() == 1 && !terms), name,
                  ": want as many bottlenecks as factors");
  STD_TORCH_CHECK(bases.empty() || bases.size() == outs.size(), name,
                  ": want no base or one per output");
  STD_TORCH_CHECK(!mask_out || outs.size() == 1, name, ": a mask on the product wants one output");
  STD_TORCH_CHECK(!mask_a || !terms, name, ": a mask on the bottlenecks wants as many outputs");
  ExpandParams p = {};
  p.dtype = dtype_of(outs[0], name);
  p.rows = outs[0].size(0);
  p.outputs = static_cast<int32_t>(outs.size());
  p.terms = terms ? static_cast<int32_t>(factors.size()) : 1;
  fill_ranks(p.ranks, factors, a.size() == 1, name);
  fill_scales(p.scales, scales, outs.size(), name);
  p.b_rank_columns = !terms && have_rank_columns(factors);
  for (size_t k = 0; k < factors.size(); ++k) {
    const Tensor &hidden = a.size() == 1 ? a[0] : a[k], &out = terms ? outs[0] : outs[k];
    check_same_dtype(hidden, outs[0], name);
    check_same_dtype(factors[k], outs[0], name);
    check_same_dtype(out, outs[0], name);
    p.widths[k] = out.size(1);
    p.a[k] = matrix(hidden, p.rows, p.ranks[k], name);
    p.b[k] = factor(factors[k], p.widths[k], p.ranks[k], p.b_rank_columns, name);
    p.out[k] = matrix(out, p.rows, p.widths[k], name);
    if (k < bases.size()) {
      check_same_dtype(bases[k], outs[0], name);
      p.base[k] = matrix(bases[k], p.rows, p.widths[k], name);
    }
  }
  p.dropout = dropout_of(rng, dropout);
  p.mask_a = mask_a && p.dropout.rng != nullptr;
  p.mask_out = mask_out && p.dropout.rng != nullptr;
  return p;
}

// outs[k] = bases[k] + scale_k * mask (drop_k(a_k) factors[k]^T); a: one for all outputs or one
// each; bases[k] may be outs[k]. With one output and several factors (rows of R_k in memory) it is
// the sum over them, each term with its mask.
void lowrank_linear_expand(Tensors a, Tensors factors, Tensors bases, Tensors outs, MaybeTensor rng,
                           std::vector<double> scales, double dropout, bool mask_a, bool mask_out) {
  const ExpandParams p = expand_params(a, factors, bases, outs, rng, scales, dropout, mask_a,
                                       mask_out, "lowrank_linear_expand");
  const Device device(outs[0]);
  check_launch(launch_lowrank_expand(p, device.stream()), "lowrank_linear_expand");
}

// hiddens = drop(x) downs^T, outs[k] = bases[k] + scale_k * drop_k(hidden) factors[k]^T, in one
// launch; downs and hiddens: one for all outputs or one each.
void lowrank_linear_fwd_update(Tensor x, Tensors downs, Tensors hiddens, Tensors factors,
                               Tensors bases, Tensors outs, MaybeTensor rng,
                               std::vector<double> scales, double dropout, bool mask_x,
                               bool mask_hidden) {
  const char* const name = "lowrank_linear_fwd_update";
  STD_TORCH_CHECK(!(mask_x && mask_hidden), name, ": want one place of dropout");
  STD_TORCH_CHECK(factors.size() == outs.size(), name, ": want as many factors as outputs");
  STD_TORCH_CHECK(downs.size() == hiddens.size() && !downs.empty(), name,
                  ": want as many bottlenecks as down-projections");
  UpdateParams p = {};
  p.expand =
      expand_params(hiddens, factors, bases, outs, rng, scales, dropout, mask_hidden, false, name);
  p.own = downs.size() > 1;
  check_same_dtype(x, outs[0], "lowrank_linear_fwd_update: x");
  p.depth = x.size(1);
  p.x = matrix(x, p.expand.rows, p.depth, "lowrank_linear_fwd_update: x");
  for (int k = 0; k < p.expand.outputs; ++k) {
    const Tensor& down = p.own ? downs[k] : downs[0];
    check_rank(p.expand.ranks[k], kMaxFusedRank, name);
    check_same_dtype(down, outs[0], "lowrank_linear_fwd_update: down");
    p.downs[k] = matrix(down, p.expand.ranks[k], p.depth, "lowrank_linear_fwd_update: down");
  }
  p.mask_x = mask_x && p.expand.dropout.rng != nullptr;
  const Device device(outs[0]);
  check_launch(launch_lowrank_update(p, device.stream()), name);
}

// outs[j] = scales[j] * drop(bigs[j])^T drop(smalls[j]) as a [width_j, R_j] tensor of any strides.
// masks[j]: 0 none, 1 big, 2 small, of stream streams[j]. splits: 0 chooses.
void lowrank_linear_bwd_weights(Tensors bigs, Tensors smalls, Tensors outs, MaybeTensor rng,
                                std::vector<double> scales, double dropout,
                                std::vector<int64_t> masks, std::vector<int64_t> streams,
                                int64_t splits) {
  const char* const name = "lowrank_linear_bwd_weights";
  const size_t jobs = bigs.size();
  STD_TORCH_CHECK(jobs >= 1 && jobs <= kMaxJobs, name, ": want 1 to ", kMaxJobs,
                  " reductions, got ", jobs);
  STD_TORCH_CHECK(smalls.size() == jobs && outs.size() == jobs && scales.size() == jobs &&
                      masks.size() == jobs && streams.size() == jobs,
                  name, ": want lists of one length");
  ParamGradParams p = {};
  p.dtype = dtype_of(bigs[0], name);
  p.rows = bigs[0].size(0);
  p.jobs = static_cast<int32_t>(jobs);
  p.dropout = dropout_of(rng, dropout);
  p.splits = splits;
  for (size_t j = 0; j < jobs; ++j) {
    ReduceJob& job = p.job[j];
    check_same_dtype(bigs[j], bigs[0], name);
    check_same_dtype(smalls[j], bigs[0], name);
    job.width = bigs[j].size(1);
    const int64_t rank = smalls[j].size(1);
    check_rank(rank, kMaxRank, name);
    job.rank = static_cast<int32_t>(rank);
    job.big = matrix(bigs[j], p.rows, job.width, "lowrank_linear_bwd_weights: big");
    job.small = matrix(smalls[j], p.rows, rank, "lowrank_linear_bwd_weights: small");
    STD_TORCH_CHECK(outs[j].dim() == 2 && outs[j].size(0) == job.width && outs[j].size(1) == rank,
                    "lowrank_linear_bwd_weights: out: want [", job.width, ", ", rank, "]");
    job.mask_big = masks[j] == 1 && p.dropout.rng != nullptr;
    job.mask_small = masks[j] == 2 && p.dropout.rng != nullptr;
    job.stream = static_cast<uint32_t>(streams[j]);
    job.scale = static_cast<float>(scales[j]);
    job.out = outs[j].data_ptr();
    job.out_dtype = dtype_of(outs[j], "lowrank_linear_bwd_weights: out");
    job.out_stride_width = outs[j].stride(0);
    job.out_stride_rank = outs[j].stride(1);
  }
  const Device device(outs[0]);
  plan_param_grad(p);
  Tensor partial =
      torch::stable::new_empty(outs[0], {p.splits, p.partial_stride}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.data_ptr());
  check_launch(launch_lowrank_param_grad(p, device.stream()), name);
}

}  // namespace
}  // namespace petal

PETAL_LIBRARY_FRAGMENT(PETAL_CUDA_LIBRARY, m) {
  m.def(
      "lowrank_linear_shrink(Tensor[] a, Tensor[] factors, Tensor(a!) out, Tensor? rng, "
      "float[] scales, float dropout, bool mask_a, bool mask_out, bool separate, bool small) "
      "-> ()");
  m.def(
      "lowrank_linear_expand(Tensor[] a, Tensor[] factors, Tensor[] bases, Tensor(a!)[] outs, "
      "Tensor? rng, float[] scales, float dropout, bool mask_a, bool mask_out) -> ()");
  m.def(
      "lowrank_linear_fwd_update(Tensor x, Tensor[] downs, Tensor(a!)[] hiddens, "
      "Tensor[] factors, Tensor[] bases, Tensor(b!)[] outs, Tensor? rng, float[] scales, "
      "float dropout, bool mask_x, bool mask_hidden) -> ()");
  m.def(
      "lowrank_linear_bwd_weights(Tensor[] bigs, Tensor[] smalls, Tensor(a!)[] outs, Tensor? rng, "
      "float[] scales, float dropout, int[] masks, int[] streams, int splits) -> ()");
}

PETAL_LIBRARY_IMPL(PETAL_CUDA_LIBRARY, PETAL_CUDA_KEY, m) {
  m.impl("lowrank_linear_shrink", TORCH_BOX(&petal::lowrank_linear_shrink));
  m.impl("lowrank_linear_expand", TORCH_BOX(&petal::lowrank_linear_expand));
  m.impl("lowrank_linear_fwd_update", TORCH_BOX(&petal::lowrank_linear_fwd_update));
  m.impl("lowrank_linear_bwd_weights", TORCH_BOX(&petal::lowrank_linear_bwd_weights));
}
