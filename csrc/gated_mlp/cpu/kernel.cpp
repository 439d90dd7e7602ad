// gated_mlp on the CPU: what lies between the linears, in one pass each way.
//
// Forward   p = act(g) * u
// Backward  du = act(g) * dp,  dg = act'(g) * u * dp,  dA = dh^T (mask * p), p formed again
//           (without u, the plain MLP: p = act(g), dg = act'(g) * dp)
//
// Shapes   g, u, p and their gradients [N, F], dh [N, R], unit stride in the last dim, any row
//          stride; dA [R, F] by partials.
// Grid     forward: a task owns rows. Backward: a split of the rows for a strip of columns; it goes
//          through its rows in blocks, whose p waits in cache for the product with dh.
// Traffic  forward 3 N F, backward 5 N F: each operand once, dg in dp's place; eager code moves 5 N F forward, and
//          backward 9 N F, with masks 12 N F and more. dh is read once per strip.
// Numerics fp32 within about two units in the last place; p of backward is not rounded; results
//          rounded once. A block of rows is a run of dA's sums.
// Limits   fp32, fp16, bf16. N and F alone fix the splits, summed in order: same bits for any
//          number of threads.
// Source   ops/gated_mlp/reference.py.
#include "common/cpu/activation.h"
#include "common/cpu/block.h"
#include "common/cpu/dropout.h"
#include "params.h"

namespace petal {
namespace PETAL_ISA {
namespace {

constexpr int64_t kBlock = 64;        // rows whose p waits
constexpr int64_t kStrip = 16 * kVL;  // columns; a multiple of 8 kVL, the counters of one vector

// act(q) and act'(q), which share their exponential.
struct Point {
  vf value, slope;
};
PETAL_INLINE Point point(Activation name, vf q) {
  switch (name) {
    case Activation::kGelu: {
      const vf half = 0.5f + 0.5f * erf_of(q * 0.70710678f);
      return {q * half, half + q * exp_of(q * q * -0.5f) * 0.39894228f};
    }
    case Activation::kGeluTanh: {
      const Sigmoid s = sigmoid_and_slope(gelu_inner(q));
      const vf inner = (q * q * (3.0f * kGeluCube) + 1.0f) * kGeluSlope;
      return {q * s.value, s.value + q * s.slope * inner};
    }
    case Activation::kSilu: {
      const Sigmoid s = sigmoid_and_slope(q);
      return {q * s.value, s.value + q * s.slope};
    }
    default: return {activation(name, q), derivative(name, q)};
  }
}

template <typename T>
void forward_of(const MlpArgs& a, int64_t row0, int64_t row1) {
  const bool streamed = may_stream(static_cast<T*>(a.p.p), a.p.ld, a.N * a.F);
  by_activation(a.activation, [&](Activation name) __attribute__((always_inline)) {
    for (int64_t i = row0; i < row1; ++i) {
      const T* g = from_row<T>(a.g, i);
      const T* u = a.u.p ? from_row<T>(a.u, i) : nullptr;
      T* p = from_row<T>(a.p, i);
      for (int64_t c = 0; c < a.F; c += kVL) {
        const int64_t n = a.F - c;
        vf v = activation(name, take(g + c, n));
        if (u) v *= take(u + c, n);
        give(p + c, v, n, streamed);
      }
    }
  });
  stream_fence();
}

// The rows of a block: dg, over dp, and du of columns [col0, col0 + cols), and p to panels of `rows` rows. What
// a panel holds behind the last column reaches such columns of the sums alone, which nobody reads.
template <typename T>
PETAL_INLINE void rows_of(const MlpArgs& a, Activation name, int64_t row0, int64_t rows,
                          int64_t col0, int64_t cols, float* panel) {
  const bool stream_u = may_stream(static_cast<T*>(a.du.p), a.du.ld, a.N * a.F);
  for (int64_t i = 0; i < rows; ++i) {
    const T* g = from_row<T>(a.g, row0 + i) + col0;
    const T* u = a.u.p ? from_row<T>(a.u, row0 + i) + col0 : nullptr;
    T* dp = a.dp.p ? from_row<T>(a.dp, row0 + i) + col0 : nullptr;
    T* du = dp && u ? from_row<T>(a.du, row0 + i) + col0 : nullptr;
    for (int64_t c = 0; c < cols; c += kVL) {
      const int64_t n = cols - c;
      const Point at = point(name, take(g + c, n));
      const vf factor = u ? take(u + c, n) : splat(1.0f);
      if (dp) {
        const vf d = take(dp + c, n);
        give(dp + c, at.slope * (factor * d), n, false);  // in cache
        if (du) give(du + c, at.value * d, n, stream_u);
      }
      if (panel) store(panel + (c / kNR * rows + i) * kNR + c % kNR, at.value * factor);
    }
  }
}

// Masks `rows` rows of panels [cols / kNR][height][kNR] whose first element is (row0, col0).
void mask_panels(float* panels, int64_t height, int64_t rows, int64_t cols, const CpuDropout& d,
                 uint32_t stream, int64_t row0, int64_t col0) {
  constexpr int64_t kRows = 16, kBytes = 16;
  uint8_t bits[kRows * kBytes];
  for (int64_t i0 = 0; i0 < rows; i0 += kRows) {
    const int64_t n = least(rows - i0, kRows);
    for (int64_t c = 0; c < cols; c += 8 * kBytes) {
      const int64_t some = least(cols - c, 8 * kBytes);
      draw_bits(bits, kBytes, d, stream, row0 + i0, n, (col0 + c) / 8, (some + 7) / 8);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < some; j += kVL) {
          float* at = panels + ((c + j) / kNR * height + i0 + i) * kNR + (c + j) % kNR;
          store(at, load(at) * multipliers(bits + i * kBytes, j, d.scale));
        }
      }
    }
  }
}

template <typename T>
void backward_of(const MlpArgs& a, int64_t split, int64_t begin, int64_t end, int64_t strip,
                 float* scratch) {
  const int64_t col0 = strip * kStrip, cols = least(kStrip, a.F - col0), count = n_panels(cols);
  float* panel = a.dh.p ? scratch : nullptr;
  float* dh = scratch + kBlock * kStrip;
  float* sum = a.dh.p ? a.ddown + (split * n_panels(a.F) + col0 / kNR) * a.R * kNR : nullptr;
  for (int64_t row0 = begin; row0 < end; row0 += kBlock) {
    const int64_t rows = least(kBlock, end - row0);
    by_activation(a.activation, [&](Activation name) __attribute__((always_inline)) {
      rows_of<T>(a, name, row0, rows, col0, cols, panel);
    });
    if (!panel) continue;
    if (a.dropout.threshold) mask_panels(panel, rows, rows, padded(cols), a.dropout, 0, row0, col0);
    to_rows(dh, padded(a.R), from_row<T>(a.dh, row0), a.dh.ld, rows, a.R);
    gemm_columns({sum, kNR, a.R * kNR}, row0 > begin, dh, padded(a.R), a.R, panel, rows * kNR, rows,
                 count);
  }
  stream_fence();
}

int64_t scratch_of(const MlpArgs& a) { return kBlock * (kStrip + padded(a.R)); }

void forward(const MlpArgs& a, int64_t row0, int64_t row1) {
  PETAL_BY_TYPE(a.type, forward_of<T>(a, row0, row1));
}
void backward(const MlpArgs& a, int64_t split, int64_t row0, int64_t row1, int64_t strip,
              float* scratch) {
  PETAL_BY_TYPE(a.type, backward_of<T>(a, split, row0, row1, strip, scratch));
}

}  // namespace

const MlpKernels& mlp_kernels() {
  static const MlpKernels table = {{kNR, kMR, pack, reduce}, kStrip, scratch_of, forward, backward};
  return table;
}

}  // namespace PETAL_ISA
}  // namespace petal
