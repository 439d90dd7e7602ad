// The routing functions of gated_bottleneck on a block of r-wide rows, sample by sample:
//   add  q = z + left     mul  q = z * left     product  q = (f(z) left^T) right   (right: or 1)
// A product with one vision token is a dot product and a scaled vector; others are register-tiled
// with the sample's matrices packed when its first row is met.
#pragma once

#include "parts.h"

namespace petal {
namespace PETAL_ISA {
namespace {

// f(sample, first row, rows) over the runs of a block's rows that belong to one sample.
template <typename F>
PETAL_INLINE void for_samples(const GatedArgs& a, Span s, const F& f) {
  for (int64_t i = 0; i < s.rows;) {
    const int64_t sample = (s.row0 + i) / a.L;
    const int64_t n = least((sample + 1) * a.L - s.row0, s.rows) - i;
    f(sample, i, n);
    i += n;
  }
}

PETAL_INLINE bool one_token(const GatedArgs& a) { return a.V == 1 && a.right; }

template <typename T>
void pack_sample(RouteScratch& s, const GatedArgs& a, int64_t sample) {
  const T* left = static_cast<const T*>(a.left) + sample * a.V * a.R;
  const T* right = a.right ? static_cast<const T*>(a.right) + sample * a.V * a.R : nullptr;
  const bool backward = s.dleft;
  if (a.route != Route::kProduct || one_token(a)) {
    to_rows(s.left, padded(a.R), left, a.R, 1, a.R);
    if (right) to_rows(s.right, padded(a.R), right, a.R, 1, a.R);
    return;
  }
  pack_of<T>(s.left_t, left, 1, a.R, a.R, a.V, 0, n_panels(a.V));
  if (right) pack_of<T>(s.right, right, a.R, 1, a.V, a.R, 0, n_panels(a.R));
  if (backward) {
    pack_of<T>(s.left, left, a.R, 1, a.V, a.R, 0, n_panels(a.R));
    if (right) pack_of<T>(s.right_t, right, 1, a.R, a.R, a.V, 0, n_panels(a.V));
  }
}

void take_sample(RouteScratch& s, const GatedArgs& a, int64_t sample) {
  if (s.sample == sample) return;
  s.sample = sample;
  PETAL_BY_TYPE(a.type, pack_sample<T>(s, a, sample));
}

// [n, depth] times a packed matrix [depth, width], rows of padded floats.
void multiply(float* out, int64_t width, const float* from, int64_t depth, const float* matrix,
              int64_t n) {
  project_in_chains(narrow(out, width), {row_major(from, padded(depth)), depth, matrix}, n,
                    n_panels(width), nullptr);
}

// f(z) of n rows from row i on: z itself, or its positive part.
const float* routed_input(const Middle& m, const GatedArgs& a, int64_t i, int64_t n) {
  const int64_t width = padded(a.R);
  if (!a.route_relu) return m.z + i * width;
  activate(m.route.f + i * width, m.z + i * width, n * width, Activation::kRelu);
  return m.route.f + i * width;
}

void route(Middle& m, const GatedArgs& a, Span span) {
  if (a.route == Route::kNone) return;
  const int64_t width = padded(a.R);
  RouteScratch& s = m.route;
  for_samples(a, span, [&](int64_t sample, int64_t i, int64_t n) {
    take_sample(s, a, sample);
    float* q = m.q + i * width;
    const float* z = m.z + i * width;
    if (a.route != Route::kProduct) {
      const bool adds = a.route == Route::kAdd;
      for (int64_t k = 0; k < n * width; k += kVL) {
        const vf left = load(s.left + k % width);
        store(q + k, adds ? load(z + k) + left : load(z + k) * left);
      }
      return;
    }
    const float* f = routed_input(m, a, i, n);
    if (one_token(a)) {
      for (int64_t k = 0; k < n; ++k) {
        const vf p = splat(dot(f + k * width, s.left, width));
        for (int64_t c = 0; c < width; c += kVL) store(q + k * width + c, p * load(s.right + c));
      }
    } else if (a.right) {
      multiply(s.p, a.V, f, a.R, s.left_t, n);
      multiply(q, a.R, s.p, a.V, s.right, n);
    } else {
      multiply(q, a.R, f, a.R, s.left_t, n);
    }
  });
  clear_padding(narrow(m.q, a.R), span.rows, a.R);
}

// sums [V][padded(R)] (+)= A^T B over n rows: A [n, V] in rows, B [n, R] in rows.
void add_outer(float* sums, bool first, RouteScratch& s, const GatedArgs& a, const float* rows_a,
               const float* rows_b, int64_t n) {
  to_panels(s.t, rows_b, padded(a.R), n, a.R, a.block);
  gemm_columns(narrow(sums, a.R), !first, rows_a, padded(a.V), a.V, s.t, a.block * kNR, n,
               n_panels(a.R));
}

void product_backward(float* dq, Middle& m, const GatedArgs& a, bool first, int64_t i, int64_t n) {
  const int64_t width = padded(a.R);
  RouteScratch& s = m.route;
  const float* f = routed_input(m, a, i, n);
  if (one_token(a)) {
    const size_t bytes = width * sizeof(float);
    if (first) memset(s.dleft, 0, bytes), memset(s.dright, 0, bytes);
    for (int64_t k = 0; k < n; ++k, f += width, dq += width) {
      const vf p = splat(dot(f, s.left, width)), dp = splat(dot(dq, s.right, width));
      for (int64_t c = 0; c < width; c += kVL) {
        store(s.dright + c, load(s.dright + c) + p * load(dq + c));
        store(s.dleft + c, load(s.dleft + c) + dp * load(f + c));
        store(dq + c, dp * load(s.left + c));
      }
    }
    return;
  }
  const float* dp = dq;
  if (a.right) {
    if (a.dright) {
      multiply(s.p, a.V, f, a.R, s.left_t, n);
      add_outer(s.dright, first, s, a, s.p, dq, n);
    }
    multiply(s.dp, a.V, dq, a.R, s.right_t, n);
    dp = s.dp;
  }
  if (a.dleft) add_outer(s.dleft, first, s, a, dp, f, n);
  multiply(s.t, a.R, dp, a.V, s.left, n);  // dq may be dp
  memcpy(dq, s.t, n * width * sizeof(float));
}

// dq -> dz in place; the sums over a sample's tokens are stored with its last one.
void route_backward(float* dq_rows, Middle& m, const GatedArgs& a, Span span) {
  if (a.route == Route::kNone) return;
  const int64_t width = padded(a.R);
  RouteScratch& s = m.route;
  for_samples(a, span, [&](int64_t sample, int64_t i, int64_t n) {
    take_sample(s, a, sample);
    const int64_t row = span.row0 + i;
    const bool first = row % a.L == 0, last = (row + n) % a.L == 0;
    float* dq = dq_rows + i * width;
    const float* z = m.z + i * width;
    if (a.route == Route::kProduct) {
      product_backward(dq, m, a, first, i, n);
      for (int64_t k = 0; a.route_relu && k < n * width; k += kVL) {
        store(dq + k, load(z + k) <= vf{} ? vf{} : load(dq + k));
      }
    } else {
      const bool adds = a.route == Route::kAdd;
      for (int64_t c = 0; c < width; c += kVL) {
        const vf left = load(s.left + c);
        vf total = first ? vf{} : load(s.dleft + c);
        for (int64_t k = c; k < n * width; k += width) {
          const vf d = load(dq + k);
          total += adds ? d : d * load(z + k);
          if (!adds) store(dq + k, d * left);
        }
        store(s.dleft + c, total);
      }
    }
    if (!last) return;
    PETAL_BY_TYPE(a.type, {
      const int64_t at = sample * a.V * a.R;
      if (a.dleft) from_rows(static_cast<T*>(a.dleft) + at, a.R, s.dleft, width, a.V, a.R);
      if (a.dright) from_rows(static_cast<T*>(a.dright) + at, a.R, s.dright, width, a.V, a.R);
    });
  });
}

}  // namespace
}  // namespace PETAL_ISA
}  // namespace petal
