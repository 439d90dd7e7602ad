// Instruction sets the CPU kernels are compiled for, and the choice among them at run time.
//
// Each <op>/cpu/kernel.cpp is compiled once per instruction set (PETAL_ISA names it) and hands out
// a table of function pointers; PETAL_BUILT_<ISA> says which objects the library holds.
#pragma once

#include "common/enums.h"

namespace petal {

// A row tensor [N, width] in the activations' dtype; ld in elements.
struct CpuRows {
  void* p;
  int64_t ld;
};

// threshold 0: dropout is off. scale: of the kept values.
struct CpuDropout {
  uint64_t seed;
  uint32_t offset;
  uint32_t threshold;
  float scale;
};

// What every table of kernels begins with: the tile's shape and the handling of operands.
struct CpuOperands {
  int64_t panel;      // columns of a packed panel
  int64_t tile_rows;  // rows of a register tile
  // Panels [j0, j1) of the right operand B[K, cols], element (k, c) at src[k * sk + c * sc].
  void (*pack)(float* dst, const void* src, DType, int64_t sk, int64_t sc, int64_t K, int64_t cols,
               int64_t j0, int64_t j1);
  // Sum of `splits` partials [R, panel] that lie `stride` floats apart, in order, rounded; as many
  // of `cols` columns as a panel has, element (r, c) to dst[r * sr + c * sc].
  void (*reduce)(void* dst, DType, int64_t sr, int64_t sc, const float* partials, int64_t splits,
                 int64_t stride, int64_t R, int64_t cols);
};

enum class Isa : int32_t { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

#define PETAL_DECLARE_PER_ISA(function) \
  namespace generic {                   \
  function;                             \
  }                                     \
  namespace avx2 {                      \
  function;                             \
  }                                     \
  namespace avx512 {                    \
  function;                             \
  }

}  // namespace petal
