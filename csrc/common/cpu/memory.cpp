// A hint about the memory of large results.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "host.h"

namespace petal {
namespace {

// Asks for huge pages under a large result that is about to be written whole. Fresh memory is what
// an allocator hands out here (it gives tensors of this size back to the system), and touching it
// 4 KiB at a time costs more than the arithmetic that fills it.
void expect_whole_write(Tensor out) {
  void* data = out.mutable_data_ptr();
  const int64_t bytes = out.numel() * type_bytes(dtype_of(out, "out"));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  // Only a hint: a system without huge pages refuses it, and nothing is lost.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace
}  // namespace petal

STABLE_TORCH_LIBRARY_FRAGMENT(petal_native, m) {
  m.def("expect_whole_write(Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(petal_native, CPU, m) {
  m.impl("expect_whole_write", TORCH_BOX(&petal::expect_whole_write));
}
