// The choice of instruction set, made when a kernel is first needed.
#include <atomic>
#include <string>

#include "host.h"

namespace petal {
namespace {

bool has(Isa isa) {
  switch (isa) {
    case Isa::kGeneric: return true;
    case Isa::kAvx2:
#if defined(PETAL_BUILT_AVX2)
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case Isa::kAvx512:
#if defined(PETAL_BUILT_AVX512)
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
      return false;
#endif
  }
  return false;
}

Isa best() {
  return has(Isa::kAvx512) ? Isa::kAvx512 : has(Isa::kAvx2) ? Isa::kAvx2 : Isa::kGeneric;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

const char* const kNames[] = {"generic", "avx2", "avx512"};

// "" asks, "best" resets, a name limits; returns the name in use.
std::string cpu_isa(std::string name) {
  if (name == "best") {
    chosen() = best();
  } else if (!name.empty()) {
    bool known = false;
    for (int i = 0; i < 3; ++i) {
      if (name != kNames[i]) continue;
      known = true;
      STD_TORCH_CHECK(has(static_cast<Isa>(i)), "cpu_isa: ", name,
                      " is not built or this CPU lacks it");
      chosen() = static_cast<Isa>(i);
    }
    STD_TORCH_CHECK(known, "cpu_isa: want generic, avx2, avx512 or best, got ", name);
  }
  return kNames[static_cast<int>(current_isa())];
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

}  // namespace petal

STABLE_TORCH_LIBRARY_FRAGMENT(petal_native, m) { m.def("cpu_isa(str name) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(petal_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&petal::cpu_isa));
}
