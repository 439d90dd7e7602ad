// petal_kernels._host: what this build is and what this CPU can do. No tensors: those go through
// torch's stable ABI.
#include <pybind11/pybind11.h>

#include "facts.h"

namespace py = pybind11;

namespace {

py::dict build_facts() {
  py::dict out;
  for (const auto& fact : kFacts) out[fact[0]] = fact[1];
  return out;
}

py::dict cpu_capability() {
  py::dict out;
#if defined(__x86_64__)
  out["avx2"] = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("f16c");
  out["avx512"] = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  out["avx2"] = false;
  out["avx512"] = false;
#endif
  return out;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts and CPU capability.";
  m.def("build_facts", &build_facts,
        "Compiler, flags, instruction sets, CUDA architectures, commit.");
  m.def("cpu_capability", &cpu_capability, "Instruction sets of this CPU, asked at run time.");
}
