// Instruction sets the CPU kernels are compiled for, and the choice among them at run time.
//
// Each <op>_cpu_kernel.h is compiled once per instruction set (PETAL_ISA names it) and hands out a
// table of function pointers; PETAL_BUILT_<ISA> says which objects the library holds.
#ifndef PETAL_CPU_ISA_H
#define PETAL_CPU_ISA_H

#include <stdint.h>

namespace petal {

// Storage types of activations; parameters may also be fp32 beside 16-bit activations.
enum class CpuType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// threshold 0: dropout is off. scale: of the kept values.
struct CpuDropout {
  uint64_t seed;
  uint32_t offset;
  uint32_t threshold;
  float scale;
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

#endif
