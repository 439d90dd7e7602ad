// What the kernels of lowrank_linear share: shapes of a shrink, and products of one operand with
// several items side by side, each with a mask of its own on that operand.
//
// Items (outputs with a down-projection of their own; in weights.cu the jobs of a group) lie in the columns of C in slots of 16, what
// one pair of tensor-core products covers; every item begins a slot. The operand that they share is
// staged once; of each mask only the bits are kept, one plane per item of the tile, and the product
// reads the operand through the plane of the slot it is at. A dropped element is an exact zero.
#pragma once

#include "common/cuda/pipeline.cuh"
#include "params.h"

namespace petal {

// Columns of h per block. Tensor cores have multiplications to spare next to reading x, the FMA
// pipes have not: fewer padded columns in fp32.
template <typename T>
constexpr int kShrinkColumns = sizeof(T) == 2 ? 64 : 32;

// Where the slots of one column tile lie.
struct Slots {
  const int32_t* first;  // slots before item i
  int begin, end;        // the items
  int base;              // slots before the tile

  // The item of a slot; behind the last one its columns are beyond the item's.
  __device__ __forceinline__ int item(int slot) const {
    int i = begin;
    while (i + 1 < end && base + slot >= first[i + 1]) ++i;
    return i;
  }
  __device__ __forceinline__ int col(int slot, int item) const {
    return (base + slot - first[item]) * kSlot;
  }
  // Which plane each slot reads, four bits each.
  template <int COUNT>
  __device__ __forceinline__ uint32_t planes() const {
    uint32_t packed = 0;
#pragma unroll
    for (int s = 0; s < COUNT; ++s) packed |= static_cast<uint32_t>(item(s) - item(0)) << (4 * s);
    return packed;
  }
};

// Bit j of a plane's byte: whether column 8 * group + j is kept. [ROWS][COLS / 8], as the tile that
// it is laid over.
template <int ROWS, int COLS>
constexpr int kPlaneBytes = ROWS * COLS / kDropoutGroup;

template <int ROWS, int COLS>
__device__ __forceinline__ void keep_plane(unsigned char* plane, const MaskSource& mask,
                                           uint32_t stream, int64_t row0, int64_t col0) {
  constexpr int kGroups = COLS / kDropoutGroup;
  for (int i = threadIdx.x; i < ROWS * kGroups; i += kThreads) {
    const int64_t col = col0 + i % kGroups * kDropoutGroup;
    plane[i] = static_cast<unsigned char>(mask.keep8(stream, row0 + i / kGroups, col));
  }
}

// Two 16-bit elements, each kept where bit 0 of its word says so.
__device__ __forceinline__ uint32_t keep_pair(uint32_t pair, uint32_t low, uint32_t high) {
  return pair & (((0u - (low & 1u)) & 0xFFFFu) | ((0u - (high & 1u)) << 16));
}

__device__ __forceinline__ uint32_t two_bytes(const unsigned char* p) {
  return *reinterpret_cast<const uint16_t*>(p);
}

// The tile product with its left operand seen through planes.
template <typename T, int BM, int BN, int DEPTH, bool A_KC, bool B_KC, int WM, int WN, int WK>
struct KeptProduct : TileProduct<T, BM, BN, DEPTH, A_KC, B_KC, WM, WN, WK> {
  using Base = TileProduct<T, BM, BN, DEPTH, A_KC, B_KC, WM, WN, WK>;
  using Base::kCols;
  using Base::kM;
  using Base::kN;
  using Base::kRows;
  static constexpr int kPlane = kPlaneBytes<BM, DEPTH>,
                       kPlaneLd = (A_KC ? DEPTH : BM) / kDropoutGroup;
  static_assert(kN % 2 == 0 && 8 * 2 == kSlot, "a pair of products covers a slot");

  // One 16 x 16 fragment of A at (row, depth), its dropped elements zero.
  static __device__ __forceinline__ void keep(uint32_t (&f)[4], const uint32_t (&a)[4],
                                              const unsigned char* plane, int row, int depth) {
    const int lane = threadIdx.x % kWarp, across = lane / 4, along = lane % 4 * 2;
    if constexpr (A_KC) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t bits =
            two_bytes(plane + (row + half * 8 + across) * kPlaneLd + depth / 8) >> along;
        f[half] = keep_pair(a[half], bits, bits >> 1);
        f[half + 2] = keep_pair(a[half + 2], bits >> 8, bits >> 9);
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned char* const p =
            plane + (depth + half * 8 + along) * kPlaneLd + row / kDropoutGroup;
        const uint32_t low = two_bytes(p) >> across, high = two_bytes(p + kPlaneLd) >> across;
        f[half * 2] = keep_pair(a[half * 2], low, high);
        f[half * 2 + 1] = keep_pair(a[half * 2 + 1], low >> 8, high >> 8);
      }
    }
  }

  __device__ __forceinline__ void step_kept(const T* a, const T* b, const unsigned char* bits,
                                            uint32_t planes) {
    this->step_seen(a, b, [=](int col) {
      const unsigned char* const plane = bits + (planes >> (col / kSlot * 4) & 15u) * kPlane;
      return [=](uint32_t (&f)[4], const uint32_t (&fragment)[4], int row, int depth) {
        keep(f, fragment, plane, row, depth);
      };
    });
  }

  // this += other where the plane [BM][BN / 8] keeps.
  __device__ __forceinline__ void add_kept(const Base& other, const unsigned char* plane) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int row = (warp % WM) * kRows + lane / 4, col = (warp / WM % WN) * kCols;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const unsigned char bits = plane[(row + m * 16 + i / 2 * 8) * (BN / 8) + col / 8 + n];
          if (bits >> (lane % 4 * 2 + i % 2) & 1) this->acc[m][n][i] += other.acc[m][n][i];
        }
  }
};

template <int BM, int BN, int DEPTH, bool A_KC, bool B_KC, int WM, int WN, int WK>
struct KeptProduct<float, BM, BN, DEPTH, A_KC, B_KC, WM, WN, WK>
    : TileProduct<float, BM, BN, DEPTH, A_KC, B_KC, WM, WN, WK> {
  using Base = TileProduct<float, BM, BN, DEPTH, A_KC, B_KC, WM, WN, WK>;
  using Base::kM;
  using Base::kN;
  static constexpr int kPlane = kPlaneBytes<BM, DEPTH>,
                       kPlaneLd = (A_KC ? DEPTH : BM) / kDropoutGroup;
  // Neighbours among a thread's columns that lie in one slot.
  static constexpr int kRun = !B_KC && kN % 4 == 0 ? 4 : kSlot / Base::kAcross;
  static_assert(kRun >= 1 && kN % kRun == 0, "slots of whole runs");

  static __device__ __forceinline__ bool kept(const unsigned char* plane, int row, int depth) {
    const int r = A_KC ? row : depth, c = A_KC ? depth : row;
    return plane[r * kPlaneLd + c / kDropoutGroup] >> (c % kDropoutGroup) & 1;
  }

  __device__ __forceinline__ void step_kept(const float* a, const float* b,
                                            const unsigned char* bits, uint32_t planes) {
    this->template step_seen<kRun, 1>(a, b, [=](int col) {
      const unsigned char* const plane = bits + (planes >> (col / kSlot * 4) & 15u) * kPlane;
      return [=](float v, int row, int depth) { return kept(plane, row, depth) ? v : 0.0f; };
    });
  }

  __device__ __forceinline__ void add_kept(const Base& other, const unsigned char* plane) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int col = Base::col(n);
        if (plane[Base::row(m) * (BN / 8) + col / 8] >> (col % 8) & 1)
          this->total[m][n] += other.total[m][n];
      }
  }
};

// Block shapes of a shrink: the products of 64-row blocks split C over the warps, those of 16-row
// blocks split the contraction.
template <typename T, int BM, int BN, bool B_KC>
struct ShrinkShape {
  static constexpr int kD = kDepth<T>, kSlots = BN / kSlot;
  static constexpr int kWarpsM = BM == 64 ? 2 : 1, kWarpsN = BM == 64 ? 2 : 1,
                       kWarpsK = BM == 64 ? 1 : 4;
  using Product = KeptProduct<T, BM, BN, kD, true, B_KC, kWarpsM, kWarpsN, kWarpsK>;
  static constexpr int kA = kTileElements<T, BM, kD>,
                       kB = B_KC ? kTileElements<T, BN, kD> : kTileElements<T, kD, BN>;
  using Tiles = Ring<T, kA, kB>;
  static constexpr size_t kStageBytes = sizeof(float) * Product::kCopies * Stage<BM, BN>::kFloats;
};

// Where a loop over (k, contraction tiles of k) stands.
struct Cursor {
  int k;
  int64_t col;
  // True after the last tile of k.
  template <typename Width>
  __device__ __forceinline__ bool advance(const Width* widths, int depth) {
    col += depth;
    if (col < widths[k]) return false;
    col = 0;
    ++k;
    return true;
  }
};

}  // namespace petal
