// Tiles: global -> shared loads with ragged edges, dropout in place, and C += A B^T on a block
// tile.
//
// A shared tile mirrors its piece of the row-major global matrix, padded by 16 bytes per row so
// that the eight row addresses of an ldmatrix fall into different banks. Whether the contraction
// runs along the rows or the columns of that matrix is a template parameter of the product (A_KC /
// B_KC: the contraction index is the contiguous one), so no operand is ever transposed in memory.
#pragma once

#include "common/philox.h"
#include "mma.cuh"
#include "vec.cuh"

namespace petal {

// For __launch_bounds__: rings of tiles fill the shared memory before registers run out; not told
// so, ptxas aims at more blocks than fit, and spills.
constexpr int kMinBlocks = 1;

template <typename T, int COLS>
constexpr int kLd = COLS + kVec<T>;
template <typename T, int ROWS, int COLS>
constexpr int kTileElements = ROWS * kLd<T, COLS>;
template <typename T>
constexpr int kDepth =
    128 / static_cast<int>(sizeof(T));  // contraction depth of one stage: 128 bytes

// Rows [row0, row0 + ROWS) x columns [col0, col0 + COLS) of a matrix of `rows` x `cols`; zeros
// outside. LD: elements from row to row where the tile is a piece of a wider one.
template <typename T, int ROWS, int COLS, int LD = kLd<T, COLS>>
__device__ __forceinline__ void load_tile(T* tile, const T* data, int64_t stride, bool vec,
                                          int64_t row0, int64_t rows, int64_t col0, int64_t cols) {
  constexpr int kChunks = COLS / kVec<T>;
#pragma unroll 1  // copies do not wait for each other; unrolled, their addresses only cost
                  // registers
  for (int i = threadIdx.x; i < ROWS * kChunks; i += kThreads) {
    const int r = i / kChunks, c = (i % kChunks) * kVec<T>;
    T* const target = tile + r * LD + c;
    const int valid = row0 + r < rows ? valid_columns(col0 + c, cols, kVec<T>) : 0;
    const T* const source = data + (valid > 0 ? (row0 + r) * stride + col0 + c : 0);
    if (vec) {
      cp_async_16(target, source, valid * static_cast<int>(sizeof(T)));
    } else {
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) target[j] = j < valid ? source[j] : from_float<T>(0.0f);
    }
  }
}

struct MaskSource {
  int64_t seed = 0, offset = 0;
  uint32_t threshold = 0;
  __device__ __forceinline__ uint32_t keep8(uint32_t stream, int64_t row, int64_t col) const {
    return dropout_keep8(seed, offset, stream, row, col / kDropoutGroup, threshold);
  }
};

__device__ __forceinline__ MaskSource mask_source(const Dropout& dropout) {
  MaskSource mask;
  if (dropout.rng != nullptr) {
    mask.seed = dropout.rng[0];
    mask.offset = dropout.rng[1];
    mask.threshold = dropout.threshold;
  }
  return mask;
}

// Zeroes the dropped elements of a shared tile whose first element is (row0, col0) of the masked
// matrix. The factor of the kept elements belongs into the fp32 epilogue of the product: operands
// stay exact.
template <typename T, int ROWS, int COLS>
__device__ __forceinline__ void mask_tile(T* tile, const MaskSource& mask, uint32_t stream,
                                          int64_t row0, int64_t col0) {
  constexpr int kGroups = COLS / kDropoutGroup;
  for (int i = threadIdx.x; i < ROWS * kGroups; i += kThreads) {
    const int r = i / kGroups, c = (i % kGroups) * kDropoutGroup;
    const uint32_t keep = mask.keep8(stream, row0 + r, col0 + c);
    T* const p = tile + r * kLd<T, COLS> + c;
#pragma unroll
    for (int j = 0; j < kDropoutGroup; j += kVec<T>) {
      Pack<T> pack = *reinterpret_cast<Pack<T>*>(p + j);
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) {
        if (!((keep >> (j + e)) & 1u)) pack.e[e] = from_float<T>(0.0f);
      }
      *reinterpret_cast<Pack<T>*>(p + j) = pack;
    }
  }
}

// How the columns of C see A: all of them as it is. seen(col) is what the columns from `col` on see,
// and that maps a fragment of A, or in fp32 an element, at (row, depth).
struct SeenWhole {
  __device__ __forceinline__ SeenWhole operator()(int) const { return {}; }
  __device__ __forceinline__ void operator()(uint32_t (&f)[4], const uint32_t (&a)[4], int,
                                             int) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) f[i] = a[i];
  }
  __device__ __forceinline__ float operator()(float v, int, int) const { return v; }
};

// C [BM, BN] += A [BM, DEPTH] B [BN, DEPTH]^T on tensor cores; warps WM x WN over C and WK over the
// contraction. A tile: [BM][DEPTH] if A_KC else [DEPTH][BM]; B tile: [BN][DEPTH] if B_KC else
// [DEPTH][BN]; LDA, LDB: elements from row to row where a tile is a piece of a larger one.
template <typename T, int BM, int BN, int DEPTH, bool A_KC, bool B_KC, int WM, int WN, int WK,
          int LDA = kLd<T, (A_KC ? DEPTH : BM)>, int LDB = kLd<T, (B_KC ? DEPTH : BN)>>
struct TileProduct {
  static_assert(WM * WN * WK * kWarp == kThreads, "four warps");
  static constexpr int kRows = BM / WM, kCols = BN / WN, kM = kRows / 16, kN = kCols / 8;
  static_assert(kM >= 1 && kN >= 2 && kN % 2 == 0 && DEPTH % (16 * WK) == 0, "warp tile");
  static constexpr int kCopies = WK;  // partial results in the stage
  float acc[kM][kN][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
  }

  __device__ __forceinline__ void step(const T* a, const T* b) { step_seen(a, b, SeenWhole{}); }

  // A pair of products, 16 columns, sees one thing.
  template <class Seen>
  __device__ __forceinline__ void step_seen(const T* a, const T* b, Seen seen) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int row = (warp % WM) * kRows, col = (warp / WM % WN) * kCols, slice = warp / (WM * WN);
    // Row and column, inside a 16 x 16 block, of the 8-element row this lane names to ldmatrix.
    const int low = lane & 15, high = (lane >> 4) << 3, even = (lane & 7) + high, odd = lane & 8;
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16 * WK) {
      const int depth = k + slice * 16;
      uint32_t fa[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if constexpr (A_KC) {
          ldmatrix_x4(fa[m], a + (row + m * 16 + low) * LDA + depth + high);
        } else {
          ldmatrix_x4_trans(fa[m], a + (depth + even) * LDA + row + m * 16 + odd);
        }
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        const auto pair = seen(col + n * 8);
        uint32_t fb[4];
        if constexpr (B_KC) {
          ldmatrix_x4(fb, b + (col + n * 8 + even) * LDB + depth + odd);
        } else {
          ldmatrix_x4_trans(fb, b + (depth + low) * LDB + col + n * 8 + high);
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          uint32_t f[4];
          pair(f, fa[m], row + m * 16, depth);
          mma_16816<T>(acc[m][n], f, fb[0], fb[1]);
          mma_16816<T>(acc[m][n + 1], f, fb[2], fb[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* stage) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int row = (warp % WM) * kRows + lane / 4, col = (warp / WM % WN) * kCols + lane % 4 * 2,
              slice = warp / (WM * WN);
    float* const p = stage + (slice * BM + row) * (BN + 8) + col;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          float2 pair;
          pair.x = acc[m][n][i];
          pair.y = acc[m][n][i + 1];
          *reinterpret_cast<float2*>(p + (m * 16 + i * 4) * (BN + 8) + n * 8) = pair;
        }
  }
};

// The same on the FMA pipes in IEEE fp32. A thread owns a kM x kN piece of C; along a contiguous
// operand its elements are runs of four.
template <int BM, int BN, int DEPTH, bool A_KC, bool B_KC, int WM, int WN, int WK, int LDA, int LDB>
struct TileProduct<float, BM, BN, DEPTH, A_KC, B_KC, WM, WN, WK, LDA, LDB> {
  static constexpr int kAcross = BN >= 64 ? 16 : 8,
                       kDown = kThreads / kAcross;  // threads along a row and a column of C
  static constexpr int kM = BM / kDown, kN = BN / kAcross;
  static_assert(kM >= 1 && kN >= 1 && DEPTH % 4 == 0, "thread tile");
  static constexpr int kCopies = 1;
  float total[kM][kN];

  template <bool RUNS, int COUNT, int ACROSS>
  static __device__ __forceinline__ int index(int thread, int i) {
    if constexpr (RUNS && COUNT % 4 == 0) return i / 4 * (ACROSS * 4) + thread * 4 + i % 4;
    return thread + i * ACROSS;
  }
  static __device__ __forceinline__ int row(int i) {
    return index<!A_KC, kM, kDown>(threadIdx.x / kAcross, i);
  }
  static __device__ __forceinline__ int col(int i) {
    return index<!B_KC, kN, kAcross>(threadIdx.x % kAcross, i);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) total[m][n] = 0.0f;
  }

  // Four contraction steps of one operand: v[index][step].
  template <bool KC, int COUNT, int LD, class Index>
  static __device__ __forceinline__ void fetch(float (&v)[COUNT][4], const float* tile, int k,
                                               Index index_of) {
    if constexpr (KC) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const Pack<float> pack = *reinterpret_cast<const Pack<float>*>(tile + index_of(i) * LD + k);
#pragma unroll
        for (int s = 0; s < 4; ++s) v[i][s] = pack.e[s];
      }
    } else if constexpr (COUNT % 4 == 0) {
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
          const Pack<float> pack =
              *reinterpret_cast<const Pack<float>*>(tile + (k + s) * LD + index_of(i));
#pragma unroll
          for (int e = 0; e < 4; ++e) v[i + e][s] = pack.e[e];
        }
    } else {
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int i = 0; i < COUNT; ++i) v[i][s] = tile[(k + s) * LD + index_of(i)];
    }
  }

  __device__ __forceinline__ void step(const float* a, const float* b) {
    step_seen<kN, 2>(a, b, SeenWhole{});
  }

  // RUN of a thread's columns see one thing. A stage is summed by itself and then added: the
  // rounding error of a long contraction grows with the root of its stages, not of its elements.
  template <int RUN, int UNROLL, class Seen>
  __device__ __forceinline__ void step_seen(const float* a, const float* b, Seen seen) {
    float acc[kM][kN] = {};
#pragma unroll UNROLL
    for (int k = 0; k < DEPTH; k += 4) {
      float va[kM][4], vb[kN][4];
      fetch<A_KC, kM, LDA>(va, a, k, [](int i) { return row(i); });
      fetch<B_KC, kN, LDB>(vb, b, k, [](int i) { return col(i); });
#pragma unroll
      for (int run = 0; run < kN; run += RUN) {
        const auto those = seen(col(run));
#pragma unroll
        for (int s = 0; s < 4; ++s)
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            const float v = those(va[m][s], row(m), k + s);
#pragma unroll
            for (int n = run; n < run + RUN; ++n) acc[m][n] = fmaf(v, vb[n][s], acc[m][n]);
          }
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) total[m][n] += acc[m][n];
  }

  __device__ __forceinline__ void store(float* stage) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) stage[row(m) * (BN + 8) + col(n)] = total[m][n];
  }
};

// The stage: C in fp32, [copies][BM][BN + 8]. A thread then owns whole groups of eight columns,
// which is what one call of the generator and one 16-byte access serve; chunk(i) names the i-th of
// them.
template <int BM, int BN>
struct Stage {
  static constexpr int kChunks = BM * BN / 8, kPerThread = (kChunks + kThreads - 1) / kThreads;
  static constexpr int kFloats = BM * (BN + 8);
  static __device__ __forceinline__ bool has(int i) {
    return kChunks % kThreads == 0 || threadIdx.x + i * kThreads < kChunks;
  }
  static __device__ __forceinline__ int row(int i) {
    return (threadIdx.x + i * kThreads) / (BN / 8);
  }
  static __device__ __forceinline__ int col(int i) {
    return (threadIdx.x + i * kThreads) % (BN / 8) * 8;
  }
  // v = sum = v + sum, or v at the first call: a running sum in shared memory that only its owner
  // touches.
  static __device__ __forceinline__ void accumulate(float (&v)[8], float* sum, int i, bool first) {
    if (!has(i)) return;
    float* const p = sum + row(i) * (BN + 8) + col(i);
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      Pack<float> pack = *reinterpret_cast<const Pack<float>*>(p + j);
#pragma unroll
      for (int e = 0; e < 4; ++e) v[j + e] = pack.e[e] = first ? v[j + e] : pack.e[e] + v[j + e];
      *reinterpret_cast<Pack<float>*>(p + j) = pack;
    }
  }
  template <int COPIES>
  static __device__ __forceinline__ void read(float (&v)[8], const float* stage, int i) {
#pragma unroll
    for (int copy = 0; copy < COPIES; ++copy) {
      const float* const p = stage + (copy * BM + row(i)) * (BN + 8) + col(i);
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const Pack<float> pack = *reinterpret_cast<const Pack<float>*>(p + j);
#pragma unroll
        for (int e = 0; e < 4; ++e) v[j + e] = copy == 0 ? pack.e[e] : v[j + e] + pack.e[e];
      }
    }
  }
};

}  // namespace petal
