// mode_contract on the CPU: a task owns slabs C[a, :, :] of the core for all modes at once.
//
// Forward, per slab:
//   M_a^T = s C[a] p^T            [R, K], in cache (CP: the one number s lambda_a p_k[a] per mode)
//   PT[:, a, :] = M_a V^T         [K, O]  (without V: M[:, a, :] = M_a)
// Backward, per slab, from D = dPT[:, a, :] [K, O]:
//   dM_a = s D V  (CP: t_k = s D_k . V[:, a]),   dV^T += M_a^T D
//   dC[a] = dM_a^T p,   dp += dM_a C[a]  (CP: dlambda_a = sum_k p_k[a] t_k, dp_k[a] = lambda_a t_k)
//
// Shapes   core [R, R, R] or [R], p [K, R], V [O, R], PT [K, R, O]; contiguous.
// Grid     a task: slabs C[a, :, :] for all modes, in backward a range of them.
// Traffic  the core, p and V are read once per task (V and p packed once per call), PT is written or
//          dPT read once. M is never stored.
// Numerics fp32 accumulation, results rounded once; dp and dV are fp32 partials per range.
// Limits   fp32, fp16, bf16. R alone fixes the ranges, summed in order: same bits for any number of
//          threads.
// Source   ops/mode_contract/reference.py.
#include "common/cpu/block.h"
#include "params.h"

namespace petal {
namespace PETAL_ISA {
namespace {

int64_t scratch_of(const ModeArgs& a) {
  // slab, M_a^T, dM_a, and D in panels
  return a.R * padded(a.R) * 2 + a.R * padded(a.K) + a.K * padded(a.R) + a.K * padded(a.O) + 128;
}

// C[a] in fp32 rows of padded(R).
void load_slab(float* slab, const ModeArgs& a, int64_t index) {
  PETAL_BY_TYPE(a.in, to_rows(slab, padded(a.R), static_cast<const T*>(a.core) + index * a.R * a.R,
                              a.R, a.R, a.R));
}

float lambda(const ModeArgs& a, int64_t index) {
  PETAL_BY_TYPE(a.in, return to_float(static_cast<const T*>(a.core)[index]));
  return 0.0f;
}

// Row c of p^T: p_k[c] for all modes.
PETAL_INLINE float mode(const ModeArgs& a, int64_t k, int64_t c) {
  return a.modes_t[(k / kNR * a.R + c) * kNR + k % kNR];
}

// s M_a^T [R][padded(K)]: a slab's rows times p^T.
void middle_of(float* middle, float* slab, const ModeArgs& a, int64_t index) {
  const int64_t width = padded(a.K);
  load_slab(slab, a, index);
  gemm({middle, width, kNR}, false, row_major(slab, padded(a.R)), a.R, a.R, a.modes_t, a.R * kNR,
       width);
  for (int64_t i = 0; i < a.R * width; i += kVL) store(middle + i, load(middle + i) * a.scale);
}

template <typename T>
void write_matrix(const ModeArgs& a, int64_t index, const float* middle) {
  T* out = static_cast<T*>(a.out) + index * a.R;
  for (int64_t k = 0; k < a.K; ++k, out += a.R * a.R) {
    for (int64_t b = 0; b < a.R; b += kVL) {
      float row[kVL];
      const int64_t n = least(kVL, a.R - b);
      for (int64_t i = 0; i < n; ++i) row[i] = middle[(b + i) * padded(a.K) + k];
      store_part(out + b, load(row), n);
    }
  }
}

template <typename T>
void forward_tucker(const ModeArgs& a, int64_t index, float* scratch) {
  float* slab = scratch;
  float* middle = slab + a.R * padded(a.R);
  middle_of(middle, slab, a, index);
  if (!a.up_t) return write_matrix<T>(a, index, middle);
  T* rows = static_cast<T*>(a.out) + index * a.O;
  const int64_t ld = a.R * a.O;
  const Output<T> out = {rows, ld, nullptr, 0, nullptr, a.O, may_stream(rows, ld, a.K * ld)};
  for (int64_t j = 0; j < n_panels(a.O); ++j) {
    for_row_tiles(a.K, [&](auto height, int64_t i) __attribute__((always_inline)) {
      Tile<decltype(height)::value> t;
      clear(t);
      mac<true>(t, middle + i, padded(a.K), a.up_t + j * a.R * kNR, a.R);
      emit(t, out, i, j);
    });
  }
}

template <typename T>
void forward_diagonal(const ModeArgs& a, int64_t index) {
  const float factor = a.scale * lambda(a, index);
  const bool streamed = may_stream(static_cast<T*>(a.out), a.O, a.K * a.R * a.O);
  for (int64_t k = 0; k < a.K; ++k) {
    T* out = static_cast<T*>(a.out) + (k * a.R + index) * a.O;
    const float m = factor * mode(a, k, index);
    for (int64_t o = 0; o < a.O; o += kVL) {
      const int64_t n = least(kVL, a.O - o);
      vf v = {};
      if (a.up_t) {
        v = load(a.up_t + (o / kNR * a.R + index) * kNR + o % kNR) * m;
      } else if (index >= o && index < o + kVL) {
        v[index - o] = m;
      }
      if (n < kVL) {
        store_part(out + o, v, n);
      } else if (streamed) {
        stream(out + o, v);
      } else {
        store(out + o, v);
      }
    }
  }
}

template <typename T>
void forward_of(const ModeArgs& a, int64_t a0, int64_t a1, float* scratch) {
  for (int64_t index = a0; index < a1; ++index) {
    a.diagonal ? forward_diagonal<T>(a, index) : forward_tucker<T>(a, index, scratch);
  }
  stream_fence();
}

// ---- backward

// D = dPT[:, a, :] in panels of K rows.
void load_dout(float* d, const ModeArgs& a, int64_t index) {
  PETAL_BY_TYPE(a.out_type, to_panels(d, static_cast<const T*>(a.dout) + index * a.O, a.R * a.O,
                                      a.K, a.O, a.K));
}

template <typename T>
void store_dcore(const ModeArgs& a, int64_t index, const float* rows) {
  from_rows(static_cast<T*>(a.dcore) + index * a.R * a.R, a.R, rows, padded(a.R), a.R, a.R);
}

void backward_tucker(const ModeArgs& a, int64_t split, bool first, int64_t index, float* scratch) {
  const int64_t width = padded(a.R);
  float* slab = scratch;
  float* result = slab + a.R * width;
  float* middle = result + a.R * width;
  float* dm = middle + a.R * padded(a.K);
  float* d = dm + a.K * width;
  load_dout(d, a, index);
  if (a.dup) {
    middle_of(middle, slab, a, index);
    float* dup = a.dup + split * n_panels(a.O) * a.R * kNR;
    gemm({dup, kNR, a.R * kNR}, !first, row_major(middle, padded(a.K)), a.R, a.K, d, a.K * kNR,
         padded(a.O));
  } else if (a.dmodes) {
    load_slab(slab, a, index);
  }
  if (!a.dmodes && !a.dcore) return;
  if (a.up) {
    gemm({dm, width, kNR}, false, panels(d, a.K), a.K, a.O, a.up, a.O * kNR, width);
  } else {
    for (int64_t j = 0; j < width / kNR; ++j) {
      for (int64_t k = 0; k < a.K; ++k) {
        store(dm + k * width + j * kNR, load(d + (j * a.K + k) * kNR));
        store(dm + k * width + j * kNR + kVL, load(d + (j * a.K + k) * kNR + kVL));
      }
    }
  }
  for (int64_t i = 0; i < a.K * width; i += kVL) store(dm + i, load(dm + i) * a.scale);
  if (a.dcore) {
    gemm_columns({result, width, kNR}, false, dm, width, a.R, a.modes, a.K * kNR, a.K, width / kNR);
    PETAL_BY_TYPE(a.in, store_dcore<T>(a, index, result));
  }
  if (a.dmodes) {
    // The slab's rows become the right operand: panels of R rows.
    to_panels(result, slab, width, a.R, a.R, a.R);
    float* dmodes = a.dmodes + split * n_panels(a.R) * a.K * kNR;
    gemm({dmodes, kNR, a.K * kNR}, !first, row_major(dm, width), a.K, a.R, result, a.R * kNR,
         width);
  }
}

// Slab a of CP touches row a of dV^T, entry a of dlambda and column a of dp only.
void backward_diagonal(const ModeArgs& a, int64_t split, int64_t index, float* scratch) {
  float* d = scratch;
  load_dout(d, a, index);
  const int64_t cols = n_panels(a.O);
  const float core = lambda(a, index);
  if (a.dup) {
    float* dup = a.dup + split * cols * a.R * kNR;
    for (int64_t j = 0; j < cols; ++j) {
      vf v0 = {}, v1 = {};
      for (int64_t k = 0; k < a.K; ++k) {
        const float m = a.scale * core * mode(a, k, index);
        v0 += load(d + (j * a.K + k) * kNR) * m;
        v1 += load(d + (j * a.K + k) * kNR + kVL) * m;
      }
      float* at = dup + (j * a.R + index) * kNR;
      store(at, v0);
      store(at + kVL, v1);
    }
  }
  if (!a.dcore && !a.dmodes) return;
  float dcore = 0.0f;
  for (int64_t k = 0; k < a.K; ++k) {
    float t = 0.0f;
    if (a.up_t) {
      vf v0 = {}, v1 = {};
      for (int64_t j = 0; j < cols; ++j) {
        const float* v = a.up_t + (j * a.R + index) * kNR;
        v0 += load(d + (j * a.K + k) * kNR) * load(v);
        v1 += load(d + (j * a.K + k) * kNR + kVL) * load(v + kVL);
      }
      v0 += v1;
      for (int i = 0; i < kVL; ++i) t += v0[i];
    } else {
      t = d[(index / kNR * a.K + k) * kNR + index % kNR];
    }
    t *= a.scale;
    dcore += mode(a, k, index) * t;
    if (a.dmodes) {
      float* dmodes = a.dmodes + split * n_panels(a.R) * a.K * kNR;
      dmodes[(index / kNR * a.K + k) * kNR + index % kNR] = core * t;
    }
  }
  PETAL_BY_TYPE(a.in, if (a.dcore) store_part(static_cast<T*>(a.dcore) + index, splat(dcore), 1));
}

void backward(const ModeArgs& a, int64_t split, int64_t a0, int64_t a1, float* scratch) {
  for (int64_t index = a0; index < a1; ++index) {
    if (a.diagonal) {
      backward_diagonal(a, split, index, scratch);
    } else {
      backward_tucker(a, split, index == a0, index, scratch);
    }
  }
}

void forward(const ModeArgs& a, int64_t a0, int64_t a1, float* scratch) {
  PETAL_BY_TYPE(a.out_type, forward_of<T>(a, a0, a1, scratch));
}

}  // namespace

const ModeKernels& mode_kernels() {
  static const ModeKernels table = {{kNR, kMR, pack, reduce}, scratch_of, forward, backward};
  return table;
}

}  // namespace PETAL_ISA
}  // namespace petal
