// Register-tiled products for skinny matrices, fp32, for the CPU kernels.
//
// A tile of kMR x kNR accumulators stays in registers while the contraction runs. Three operand
// layouts are enough for every product of the operators:
//   panels    [ceil(cols / kNR)][rows][kNR]  row blocks converted to fp32, and the packed weights
//   row-major [rows][ld]                     fp32 row blocks taken in place, and the r-wide middle
//   columns   element (i, k) at [k][i]       the transposed operand of the weight gradients
// A sum over the contraction is made of runs of kRun terms, in index order for every element, so a
// result does not depend on how rows are dealt to threads. Rounding grows with the length of a
// chain of additions: of K terms in one chain like K, in runs like sqrt(K (kRun + K / kRun)).
#pragma once

#include "simd.h"

namespace petal {
namespace PETAL_ISA {

// The left operand: element (i, k) at p[(k / width) * panel + i * row + k % width].
struct Rows {
  const float* p;
  int64_t row;
  int64_t width;
  int64_t panel;
};

PETAL_INLINE Rows row_major(const float* p, int64_t ld) { return {p, ld, INT64_MAX, 0}; }
PETAL_INLINE Rows panels(const float* p, int64_t rows) { return {p, kNR, kNR, rows * kNR}; }

// M rows of kNR columns, or of kVL (V = 1) where a panel's other half is padding.
template <int M, int V = 2>
struct Tile {
  vf v[M][V];
};

// Row indices as a parameter pack: subscripts that are constants from the start let the compiler
// keep the whole tile in registers (a loop it unrolls later does not).
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  typedef Indices<I...> type;
};

template <int M, int V, int... I>
PETAL_INLINE void clear_impl(Tile<M, V>& t, Indices<I...>) {
  ((t.v[I][0] = vf{}, t.v[I][V - 1] = vf{}), ...);
}
template <int M, int V>
PETAL_INLINE void clear(Tile<M, V>& t) {
  clear_impl(t, typename MakeIndices<M>::type());
}

template <bool kColumns, int M, int... I>
PETAL_INLINE void mac_impl(Tile<M>& t, const float* a, int64_t ld, const float* b, int64_t K,
                           Indices<I...>) {
  for (int64_t k = 0; k < K; ++k) {
    const vf b0 = load(b), b1 = load(b + kVL);
    b += kNR;
    ((t.v[I][0] += splat(a[kColumns ? I : I * ld]) * b0,
      t.v[I][1] += splat(a[kColumns ? I : I * ld]) * b1),
     ...);
    a += kColumns ? ld : 1;
  }
}
template <bool kColumns, int M, int... I>
PETAL_INLINE void mac_impl(Tile<M, 1>& t, const float* a, int64_t ld, const float* b, int64_t K,
                           Indices<I...>) {
  for (int64_t k = 0; k < K; ++k, b += kNR, a += kColumns ? ld : 1) {
    const vf b0 = load(b);
    ((t.v[I][0] += splat(a[kColumns ? I : I * ld]) * b0), ...);
  }
}

// t += A[0:M, 0:K] B[0:K, 0:kNR], element (i, k) of A at a[i * ld + k], or (kColumns) at
// a[k * ld + i].
template <bool kColumns, int M, int V>
PETAL_INLINE void mac(Tile<M, V>& t, const float* a, int64_t ld, const float* b, int64_t K) {
  mac_impl<kColumns>(t, a, ld, b, K, typename MakeIndices<M>::type());
}

// f(row of the tile, first vector, second vector) for every row; of one vector: the same twice.
template <int M, int V, typename F, int... I>
PETAL_INLINE void each_impl(Tile<M, V>& t, const F& f, Indices<I...>) {
  (f(I, t.v[I][0], t.v[I][V - 1]), ...);
}
template <int M, int V, typename F>
PETAL_INLINE void each(Tile<M, V>& t, const F& f) {
  each_impl(t, f, typename MakeIndices<M>::type());
}

// The rows of a tile to memory, `row` floats apart, and what is there added to a tile.
template <int M, int V>
PETAL_INLINE void put(Tile<M, V>& t, float* p, int64_t row) {
  each(t, [=](int r, vf& v0, vf& v1) __attribute__((always_inline)) {
    store(p + r * row, v0);
    if (V == 2) store(p + r * row + kVL, v1);
  });
}
template <int M, int V>
PETAL_INLINE void add(Tile<M, V>& t, const float* p, int64_t row) {
  each(t, [=](int r, vf& v0, vf& v1) __attribute__((always_inline)) {
    v0 += load(p + r * row);
    if (V == 2) v1 += load(p + r * row + kVL);
  });
}

// t += A[0:M, 0:K] B in one chain, A from `a` on in the layout of a row operand.
template <int M, int V>
PETAL_INLINE void mac_chain(Tile<M, V>& t, const float* a, const Rows& of, const float* b,
                            int64_t K) {
  for (; K > of.width; K -= of.width, a += of.panel, b += of.width * kNR) {
    mac<false>(t, a, of.row, b, of.width);
  }
  mac<false>(t, a, of.row, b, K);
}

constexpr int64_t kRun = 256;        // terms of a run; a multiple of every panel's width
constexpr int64_t kFollowing = 128;  // so few terms may follow on what the tile holds

// t += A[i0 : i0 + M, 0:K] B in runs that start from zero. The sum of those that are done lies in
// memory (the compiler must not see through that): registers are for the one that goes on.
template <int M, int V>
PETAL_INLINE void mac_rows(Tile<M, V>& t, const Rows& a, int64_t i0, const float* b, int64_t K) {
  float done[M * kNR];
  const bool runs = K > kFollowing;
  const auto lay_down = [&]() __attribute__((always_inline)) {
    put(t, done, kNR);
    asm volatile("" : : "r"(done) : "memory");
    clear(t);
  };
  if (runs) lay_down();
  const float* pa = a.p + i0 * a.row;
  for (; K > kRun; K -= kRun, b += kRun * kNR, pa += a.panel ? kRun / kNR * a.panel : kRun) {
    mac_chain(t, pa, a, b, kRun);
    add(t, done, kNR);
    lay_down();
  }
  mac_chain(t, pa, a, b, K);
  if (runs) add(t, done, kNR);
}

// body(Height<M>(), i) over tiles that cover rows [0, rows): full tiles, then a few lower ones.
template <int M>
struct Height {
  static constexpr int value = M;
};
template <typename Body>
PETAL_INLINE void for_row_tiles(int64_t rows, const Body& body) {
  int64_t i = 0;
  for (; i + kMR <= rows; i += kMR) body(Height<kMR>(), i);
  if (kMR > 8 && i + 8 <= rows) body(Height<8>(), i), i += 8;
  if (i + 4 <= rows) body(Height<4>(), i), i += 4;
  if (i + 2 <= rows) body(Height<2>(), i), i += 2;
  if (i < rows) body(Height<1>(), i);
}

// A block of fp32 results, tile (row i, panel j) at p + j * panel + i * row.
struct Block {
  float* p;
  int64_t row;
  int64_t panel;
};

template <int M, int V>
PETAL_INLINE void read(Tile<M, V>& t, const Block& c, int64_t i, int64_t j) {
  const float* p = c.p + j * c.panel + i * c.row;
  each(t, [=](int r, vf& v0, vf& v1) __attribute__((always_inline)) {
    v0 = load(p + r * c.row);
    if (V == 2) v1 = load(p + r * c.row + kVL);
  });
}

template <int M, int V>
PETAL_INLINE void write(Tile<M, V>& t, const Block& c, int64_t i, int64_t j) {
  put(t, c.p + j * c.panel + i * c.row, c.row);
}

template <int V>
PETAL_INLINE void gemm_panel(const Block& c, bool accumulate, const Rows& a, int64_t rows,
                             int64_t K, const float* b, int64_t j) {
  for_row_tiles(rows, [&](auto height, int64_t i) __attribute__((always_inline)) {
    Tile<decltype(height)::value, V> t;
    accumulate ? read(t, c, i, j) : clear(t);
    mac_rows(t, a, i, b, K);
    write(t, c, i, j);
  });
}

// c (+)= A[rows, K] B[K, cols]. B is packed, one panel every b_panel floats. Columns of the last
// panel may be padding: of c they are written up to a whole vector.
inline void gemm(const Block& c, bool accumulate, const Rows& a, int64_t rows, int64_t K,
                 const float* b, int64_t b_panel, int64_t cols) {
  for (int64_t j = 0; j * kNR < cols; ++j) {
    if (cols - j * kNR > kVL) {
      gemm_panel<2>(c, accumulate, a, rows, K, b + j * b_panel, j);
    } else {
      gemm_panel<1>(c, accumulate, a, rows, K, b + j * b_panel, j);
    }
  }
}

// c (+)= A^T B with A [rows, cols_a] row-major and B in panels of `rows` rows: the weight
// gradients.
inline void gemm_columns(const Block& c, bool accumulate, const float* a, int64_t lda,
                         int64_t cols_a, const float* b, int64_t b_panel, int64_t rows,
                         int64_t n_panels) {
  for (int64_t j = 0; j < n_panels; ++j) {
    for_row_tiles(cols_a, [&](auto height, int64_t i) __attribute__((always_inline)) {
      Tile<decltype(height)::value> t;
      clear(t);  // a block of rows is a run
      mac<true>(t, a + i, lda, b + j * b_panel, rows);
      if (accumulate) add(t, c.p + j * c.panel + i * c.row, c.row);
      write(t, c, i, j);
    });
  }
}

// Rows [0, rows) and columns [0, cols) of a matrix in storage type T -> fp32 panels of `height`
// rows, padded with zeros to whole panels; f(row, column, vector) is what is stored. Rows are read a
// few ahead of their use: one row's columns are a short run of lines, too short for the hardware to
// see the next row coming.
struct AsItIs {
  PETAL_INLINE vf operator()(int64_t, int64_t, vf v) const { return v; }
};
template <typename T, typename F = AsItIs>
inline void to_panels(float* dst, const T* src, int64_t ld, int64_t rows, int64_t cols,
                      int64_t height, const F& f = F()) {
  constexpr int64_t kAhead = 6, kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < rows; ++i, dst += kNR, src += ld) {
    if (i + kAhead < rows) {
      for (int64_t j = 0; j < cols; j += kLine) __builtin_prefetch(src + kAhead * ld + j, 0, 3);
    }
    float* out = dst;
    int64_t j = 0;
    for (; j + kNR <= cols; j += kNR, out += height * kNR) {
      store(out, f(i, j, load(src + j)));
      store(out + kVL, f(i, j + kVL, load(src + j + kVL)));
    }
    if (j < cols) {
      const int64_t n = cols - j;
      store(out, f(i, j, n >= kVL ? load(src + j) : load_part(src + j, n)));
      store(out + kVL, n > kVL ? f(i, j + kVL, load_part(src + j + kVL, n - kVL)) : vf{});
    }
  }
}

// fp32 panels of `height` rows -> storage, row after row; `streamed`: past the caches.
template <typename T>
inline void from_panels(T* dst, int64_t ld, const float* src, int64_t height, int64_t rows,
                        int64_t cols, bool streamed) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; j += kVL) {
      const vf v = load(src + j / kNR * height * kNR + i * kNR + j % kNR);
      T* out = dst + i * ld + j;
      if (cols - j < kVL) {
        store_part(out, v, cols - j);
      } else if (streamed) {
        stream(out, v);
      } else {
        store(out, v);
      }
    }
  }
}

// The same as to_panels into rows of `width` floats, a multiple of kNR.
template <typename T>
inline void to_rows(float* dst, int64_t width, const T* src, int64_t ld, int64_t rows,
                    int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; j += kVL) {
      const int64_t n = least(kVL, cols - j);
      store(dst + i * width + j, n == kVL ? load(src + i * ld + j)
                                 : n > 0  ? load_part(src + i * ld + j, n)
                                          : vf{});
    }
  }
}

template <typename T>
inline void from_rows(T* dst, int64_t ld, const float* src, int64_t width, int64_t rows,
                      int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; j += kVL) {
      const vf v = load(src + i * width + j);
      cols - j >= kVL ? store(dst + i * ld + j, v) : store_part(dst + i * ld + j, v, cols - j);
    }
  }
}

// Rows of whole vectors, one after the other: what the last one has too much, the next row or part
// covers.
inline void copy_rows(float* dst, int64_t dst_ld, const float* src, int64_t src_ld, int64_t rows,
                      int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; j += kVL) store(dst + i * dst_ld + j, load(src + i * src_ld + j));
  }
}

// Rounds an fp32 block to T and back: what storing it would have done.
template <typename T>
inline void round_rows(float* p, int64_t n) {
  if (sizeof(T) == sizeof(float)) return;
  T tmp[kVL];
  for (int64_t i = 0; i < n; i += kVL) {
    store(tmp, load(p + i));
    store(p + i, load(tmp));
  }
}

typedef float v4 __attribute__((vector_size(16)));
typedef float v4_mem __attribute__((vector_size(16), aligned(4), may_alias));

// dst[i * to + j] = src[j * from + i] for i, j < 4.
PETAL_INLINE void transpose4(float* dst, int64_t to, const float* src, int64_t from) {
  const v4 a = *reinterpret_cast<const v4_mem*>(src),
           b = *reinterpret_cast<const v4_mem*>(src + from);
  const v4 c = *reinterpret_cast<const v4_mem*>(src + 2 * from);
  const v4 d = *reinterpret_cast<const v4_mem*>(src + 3 * from);
  const v4 ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5),
           ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const v4 cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5),
           cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  *reinterpret_cast<v4_mem*>(dst) = __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5);
  *reinterpret_cast<v4_mem*>(dst + to) = __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7);
  *reinterpret_cast<v4_mem*>(dst + 2 * to) = __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5);
  *reinterpret_cast<v4_mem*>(dst + 3 * to) = __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7);
}

// Panel j of the right operand B[K, cols], element (k, c) at src[k * sk + c * sc] -> dst[K][kNR].
template <typename T>
inline void pack_panel(float* dst, const T* src, int64_t sk, int64_t sc, int64_t K, int64_t cols,
                       int64_t j) {
  const int64_t n = least(kNR, cols - j * kNR);
  src += j * kNR * sc;
  int64_t k = 0;
  if (sc == 1 && n == kNR) {
    for (; k < K; ++k) {
      store(dst + k * kNR, load(src + k * sk));
      store(dst + k * kNR + kVL, load(src + k * sk + kVL));
    }
  } else if (sk == 1 && n == kNR) {
    float block[kNR * kVL];
    for (; k + kVL <= K; k += kVL) {
      for (int64_t c = 0; c < kNR; ++c) store(block + c * kVL, load(src + c * sc + k));
      for (int64_t c = 0; c < kNR; c += 4) {
        for (int64_t i = 0; i < kVL; i += 4)
          transpose4(dst + (k + i) * kNR + c, kNR, block + c * kVL + i, kVL);
      }
    }
  }
  for (; k < K; ++k) {
    for (int64_t c = 0; c < n; ++c) dst[k * kNR + c] = to_float(src[k * sk + c * sc]);
    for (int64_t c = n; c < kNR; ++c) dst[k * kNR + c] = 0.0f;
  }
}

}  // namespace PETAL_ISA
}  // namespace petal
