// gated_mlp, what lies between the linears, forward. Legend: N rows, F columns; T = fp32, fp16, bf16.
//
//   p = act(g) * u        (without u, the plain MLP: p = act(g))
//
// Shapes   g, u, p [N, F] in T, unit column stride, any row stride; 16-byte accesses where address
//          and row stride allow them.
// Grid     one block per 16 x 128 tile.
// Traffic  3 N F: each operand once.
// Numerics fp32, rounded once.
// Limits   any N and F.
// Source   ops/gated_mlp/reference.py: arXiv 2002.05202.
#include "block.cuh"
#include "common/cuda/launchers.cuh"

namespace petal {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gated_mlp_act_fwd_kernel(const __grid_constant__ MlpParams p) {
  const Corner at = corner(p);
  float g[Groups::kPerThread][8], u[Groups::kPerThread][8];
#pragma unroll
  for (int i = 0; i < Groups::kPerThread; ++i) {
    const int64_t row = at.row + Groups::row(i), col = at.col + Groups::col(i);
    const int valid = valid_at(p, row, col);
    read8<T>(g[i], p.g, row, col, valid);
    if (p.u.data != nullptr) {
      read8<T>(u[i], p.u, row, col, valid);
    } else {
      ones(u[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < Groups::kPerThread; ++i) {
    const int64_t row = at.row + Groups::row(i), col = at.col + Groups::col(i);
    by_activation(p.activation, [&](Activation known) {
#pragma unroll
      for (int j = 0; j < 8; ++j) g[i][j] = activate(known, g[i][j]) * u[i][j];
    });
    write8<T>(p.p, row, col, g[i], valid_at(p, row, col));
  }
}

}  // namespace

const char* launch_gated_mlp_act_fwd(const MlpParams& params, void* stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(&gated_mlp_act_fwd_kernel<T>, tiles(params), 0, stream, params);
  });
}

}  // namespace petal
