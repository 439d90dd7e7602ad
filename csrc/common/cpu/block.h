// What the CPU kernels of several operators share beyond plain products: scratch pieces, tiles to
// and from storage, packing of weights, reduction of partial sums.
#pragma once

#include "gemm.h"
#include "isa.h"

namespace petal {
namespace PETAL_ISA {
namespace {

constexpr uint64_t kStreamBytes = 4 << 20;  // results from this size on go past the caches

PETAL_INLINE int64_t n_panels(int64_t cols) { return (cols + kNR - 1) / kNR; }
PETAL_INLINE int64_t padded(int64_t cols) { return round_up(cols, kNR); }

PETAL_INLINE int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

// The rows of a block.
struct Span {
  int64_t row0, rows;
};

// Hands out consecutive pieces of a scratch buffer.
struct Arena {
  float* p;
  PETAL_INLINE float* take(int64_t n) {
    float* out = p;
    p += round_up(n, 16);
    return out;
  }
};

// Stands in for an Arena where only the size is wanted.
struct Sizer {
  int64_t n = 0;
  float* take(int64_t floats) {
    n += round_up(floats, 16);
    return nullptr;
  }
};

PETAL_INLINE float sum(vf v) {
  for (int half = kVL / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

PETAL_INLINE float dot(const float* a, const float* b, int64_t n) {
  vf total = {};
  for (int64_t i = 0; i < n; i += kVL) total += load(a + i) * load(b + i);
  return sum(total);
}

template <typename T>
struct Storage {
  static constexpr bool kFloat = sizeof(T) == sizeof(float);
};

// Tile -> storage: t + bias + base, columns beyond `cols` left out.
template <typename T>
struct Output {
  T* out;
  int64_t ld;
  const T* base;
  int64_t base_ld;
  const float* bias;
  int64_t cols;
  bool streamed;
};

// Streaming needs whole vectors on their boundaries; it pays for results that no cache keeps.
template <typename T>
bool may_stream(const T* p, int64_t ld, int64_t total) {
  return sizeof(T) == sizeof(float) && total * sizeof(T) >= kStreamBytes &&
         reinterpret_cast<uintptr_t>(p) % (kVL * 4) == 0 && ld % kVL == 0;
}

// A vector of a row, or what is left of it.
template <typename T>
PETAL_INLINE vf take(const T* p, int64_t n) {
  return n >= kVL ? load(p) : load_part(p, n);
}
template <typename T>
PETAL_INLINE void give(T* p, vf v, int64_t n, bool streamed) {
  if (n < kVL) {
    store_part(p, v, n);
  } else if (streamed) {
    stream(p, v);
  } else {
    store(p, v);
  }
}

template <typename T, int M>
PETAL_INLINE void emit(Tile<M>& t, const Output<T>& o, int64_t i, int64_t j) {
  const int64_t col = j * kNR, n = o.cols - col;
  T* out = o.out + i * o.ld + col;
  const T* base = o.base ? o.base + i * o.base_ld + col : nullptr;
  const vf bias0 = o.bias ? load(o.bias + col) : vf{},
           bias1 = o.bias ? load(o.bias + col + kVL) : vf{};
  if (n >= kNR) {
    if (base) {
      each(t, [=](int r, vf& v0, vf& v1) __attribute__((always_inline)) {
        v0 += load(base + r * o.base_ld);
        v1 += load(base + r * o.base_ld + kVL);
      });
    }
    if (o.streamed) {
      each(t, [=](int r, vf& v0, vf& v1) __attribute__((always_inline)) {
        stream(out + r * o.ld, v0 + bias0);
        stream(out + r * o.ld + kVL, v1 + bias1);
      });
      return;
    }
    each(t, [=](int r, vf& v0, vf& v1) __attribute__((always_inline)) {
      store(out + r * o.ld, v0 + bias0);
      store(out + r * o.ld + kVL, v1 + bias1);
    });
    return;
  }
  float rest[M][kNR];
  each(t, [&](int r, vf& v0, vf& v1) __attribute__((always_inline)) {
    store(rest[r], v0 + bias0);
    store(rest[r] + kVL, v1 + bias1);
  });
  for (int r = 0; r < M; ++r) {
    for (int64_t c = 0; c < n; c += kVL) {
      const int64_t m = least(kVL, n - c);
      vf v = load(rest[r] + c);
      if (base) v += load_part(base + r * o.base_ld + c, m);
      store_part(out + r * o.ld + c, v, m);
    }
  }
}

// Brings the lines that the tile after next will add to into cache: rows are far apart, so the
// hardware does not see them coming.
template <typename T>
PETAL_INLINE void prefetch_rows(const T* p, int64_t ld, int64_t rows) {
  if (p == nullptr) return;
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < kNR; c += kLine) __builtin_prefetch(p + r * ld + c, 0, 3);
  }
}

template <typename T>
void pack_of(float* dst, const void* src, int64_t sk, int64_t sc, int64_t K, int64_t cols,
             int64_t j0, int64_t j1) {
  for (int64_t j = j0; j < j1; ++j) {
    pack_panel(dst + j * K * kNR, static_cast<const T*>(src), sk, sc, K, cols, j);
  }
}

template <typename T>
void reduce_of(void* dst, int64_t sr, int64_t sc, const float* partials, int64_t splits,
               int64_t stride, int64_t R, int64_t cols) {
  const int64_t n = least(kNR, cols);
  T* out = static_cast<T*>(dst);
  for (int64_t r = 0; r < R; ++r, partials += kNR) {
    vf v0 = load(partials), v1 = load(partials + kVL);
    for (int64_t s = 1; s < splits; ++s) {
      v0 += load(partials + s * stride);
      v1 += load(partials + s * stride + kVL);
    }
    T row[kNR];
    store(row, v0);
    store(row + kVL, v1);
    for (int64_t c = 0; c < n; ++c) out[r * sr + c * sc] = row[c];
  }
}

#define PETAL_BY_TYPE(type, call) \
  switch (type) {                 \
    case DType::kFloat32: {       \
      typedef float T;            \
      call;                       \
    } break;                      \
    case DType::kFloat16: {       \
      typedef fp16_t T;           \
      call;                       \
    } break;                      \
    case DType::kBFloat16: {      \
      typedef bf16_t T;           \
      call;                       \
    } break;                      \
  }

[[maybe_unused]] void pack(float* dst, const void* src, DType type, int64_t sk, int64_t sc,
                           int64_t K, int64_t cols, int64_t j0, int64_t j1) {
  PETAL_BY_TYPE(type, pack_of<T>(dst, src, sk, sc, K, cols, j0, j1));
}
[[maybe_unused]] void reduce(void* dst, DType type, int64_t sr, int64_t sc, const float* partials,
                             int64_t splits, int64_t stride, int64_t R, int64_t cols) {
  PETAL_BY_TYPE(type, reduce_of<T>(dst, sr, sc, partials, splits, stride, R, cols));
}

inline void round_to(DType type, float* p, int64_t n) { PETAL_BY_TYPE(type, round_rows<T>(p, n)); }

template <typename T>
PETAL_INLINE T* from_row(const CpuRows& rows, int64_t row) {
  return static_cast<T*>(rows.p) + row * rows.ld;
}

// A [rows, K] B, B packed.
struct Product {
  Rows a;
  int64_t K;
  const float* b;
};

// c (+)= A B + bias. Sums start from zero and what is there is added last: H is large beside them.
inline void project(const Block& c, bool add, const Product& m, int64_t rows, int64_t panels,
                    const float* bias) {
  for (int64_t j = 0; j < panels; ++j) {
    const vf bias0 = bias ? load(bias + j * kNR) : vf{};
    const vf bias1 = bias ? load(bias + j * kNR + kVL) : vf{};
    for_row_tiles(rows, [&](auto height, int64_t i) __attribute__((always_inline)) {
      Tile<decltype(height)::value> t;
      clear(t);
      mac_rows(t, m.a, i, m.b + j * m.K * kNR, m.K);
      float* p = c.p + j * c.panel + i * c.row;
      each(t, [=](int r, vf& v0, vf& v1) __attribute__((always_inline)) {
        float* at = p + r * c.row;
        store(at, v0 + bias0 + (add ? load(at) : vf{}));
        store(at + kVL, v1 + bias1 + (add ? load(at + kVL) : vf{}));
      });
    });
  }
}

}  // namespace
}  // namespace PETAL_ISA
}  // namespace petal
