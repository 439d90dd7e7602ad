// frozen_norm on the CPU: a row's statistics and its result, one row after the other.
//
// Forward   y = xhat w' + b; xhat = x rho, of LayerNorm (x - mean) rho; w' = w or 1 + w
// Backward  g = dy w', dx = rho (g - xhat mean(g xhat)), of LayerNorm less mean(g) too
//
// Shapes   x, y, dy and dx [N, D], unit stride in the last dim, any row stride; weight and bias [D];
//          moments [N, 1] (rho) or [N, 2] (mean, rho), fp32.
// Grid     a task owns rows. A row is walked twice, in LayerNorm's forward three times, and waits in
//          the first cache between its walks.
// Traffic  forward 2 N D, backward 3 N D, the moments once each way. Eager code that forms 16-bit
//          rows in fp32 moves 8 N D and more.
// Numerics fp32; four running sums of a vector each, added in one order: the same bits for any number
//          of threads. y and dx are rounded once, with `rounded` the normalised row too.
// Limits   fp32, fp16, bf16.
// Source   ops/frozen_norm/reference.py.
#include "common/cpu/block.h"
#include "params.h"

namespace petal {
namespace PETAL_ISA {
namespace {

constexpr int kSums = 4;

// term(c, n) is a vector of the row from column c on, n columns being left; those beyond count 0.
template <typename Term>
PETAL_INLINE float row_sum(int64_t width, Term term) {
  vf sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums * kVL <= width; c += kSums * kVL) {
    for (int j = 0; j < kSums; ++j) sums[j] += term(c + j * kVL, kVL);
  }
  for (; c < width; c += kVL) {
    const int64_t n = width - c;
    vf v = term(c, n);
    for (int64_t i = n; i < kVL; ++i) v[i] = 0.0f;
    sums[0] += v;
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
PETAL_INLINE vf rounded(vf v) {
  if (Storage<T>::kFloat) return v;
  T stored[kVL];
  store(stored, v);
  return load(stored);
}

// What a row is multiplied by from column c on.
template <typename T>
PETAL_INLINE vf factor(const NormArgs& a, int64_t c, int64_t n) {
  return a.weight ? take(static_cast<const T*>(a.weight) + c, n) + a.offset : splat(1.0f);
}

template <typename T>
void forward_of(const NormArgs& a, int64_t row0, int64_t row1) {
  const bool streamed = may_stream(static_cast<T*>(a.y.p), a.y.ld, a.N * a.D);
  const T* bias = static_cast<const T*>(a.bias);
  const float width = static_cast<float>(a.D);
  for (int64_t i = row0; i < row1; ++i) {
    const T* x = from_row<T>(a.x, i);
    T* y = from_row<T>(a.y, i);
    float mean = 0.0f;
    if (a.centered) {
      mean = row_sum(a.D, [&](int64_t c, int64_t n)
                              __attribute__((always_inline)) { return take(x + c, n); }) /
             width;
    }
    const float square = row_sum(a.D, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      const vf v = take(x + c, n) - mean;
      return v * v;
    });
    const float rho = 1.0f / __builtin_sqrtf(square / width + a.eps);
    float* moments = a.moments + (a.centered ? 2 : 1) * i;
    if (a.centered) *moments++ = mean;
    *moments = rho;
    for (int64_t c = 0; c < a.D; c += kVL) {
      const int64_t n = a.D - c;
      vf v = (take(x + c, n) - mean) * rho;
      if (a.rounded) v = rounded<T>(v);
      v *= factor<T>(a, c, n);
      if (bias) v += take(bias + c, n);
      give(y + c, v, n, streamed);
    }
  }
  stream_fence();
}

template <typename T>
void backward_of(const NormArgs& a, int64_t row0, int64_t row1) {
  const bool streamed = may_stream(static_cast<T*>(a.dx.p), a.dx.ld, a.N * a.D);
  const float width = static_cast<float>(a.D);
  for (int64_t i = row0; i < row1; ++i) {
    const T* x = from_row<T>(a.x, i);
    const T* dy = from_row<T>(a.dy, i);
    T* dx = from_row<T>(a.dx, i);
    const float* moments = a.moments + (a.centered ? 2 : 1) * i;
    const float mean = a.centered ? moments[0] : 0.0f, rho = moments[a.centered ? 1 : 0];
    const float mean_gx = row_sum(a.D,
                                  [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                                    const vf g = take(dy + c, n) * factor<T>(a, c, n);
                                    return g * ((take(x + c, n) - mean) * rho);
                                  }) /
                          width;
    float mean_g = 0.0f;
    if (a.centered) {
      mean_g = row_sum(a.D, [&](int64_t c, int64_t n) __attribute__((
                                always_inline)) { return take(dy + c, n) * factor<T>(a, c, n); }) /
               width;
    }
    for (int64_t c = 0; c < a.D; c += kVL) {
      const int64_t n = a.D - c;
      const vf g = take(dy + c, n) * factor<T>(a, c, n);
      const vf xhat = (take(x + c, n) - mean) * rho;
      give(dx + c, (g - xhat * mean_gx - mean_g) * rho, n, streamed);
    }
  }
  stream_fence();
}

void forward(const NormArgs& a, int64_t row0, int64_t row1) {
  PETAL_BY_TYPE(a.type, forward_of<T>(a, row0, row1));
}
void backward(const NormArgs& a, int64_t row0, int64_t row1) {
  PETAL_BY_TYPE(a.type, backward_of<T>(a, row0, row1));
}

}  // namespace

const NormKernels& norm_kernels() {
  static const NormKernels table = {forward, backward};
  return table;
}

}  // namespace PETAL_ISA
}  // namespace petal
