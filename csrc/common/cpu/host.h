// Host side of the CPU kernels: tensors to raw pointers, tasks to threads, scratch memory, and the
// instruction set.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "common/philox.h"
#include "common/torch_boundary.h"
#include "isa.h"

namespace petal {

// The instruction set in use: the best one that was built and that this CPU has, or a lesser one
// asked for by name.
Isa current_isa();

inline size_t type_bytes(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// The row stride of a matrix whose columns are adjacent.
inline int64_t row_stride(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": want a matrix, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.stride(1) == 1 || t.size(1) <= 1, name, ": want unit stride along columns");
  return t.stride(0);
}

inline CpuDropout cpu_dropout(const std::optional<Tensor>& rng, double p) {
  const uint32_t threshold = rng.has_value() ? dropout_threshold(p) : 0;
  if (threshold == 0) return {0, 0, 0, 1.0f};
  STD_TORCH_CHECK(rng->scalar_type() == ScalarType::Long && rng->numel() == 2,
                  "rng: want int64 [2] = (seed, offset)");
  const int64_t* state = static_cast<const int64_t*>(rng->const_data_ptr());
  return {static_cast<uint64_t>(state[0]), static_cast<uint32_t>(state[rng->stride(0)]), threshold,
          dropout_scale(threshold)};
}

// Floats on a 64-byte boundary. A buffer of moderate size stays with its thread for the next call:
// fresh pages cost more than the kernels that a call of a few rows runs.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 4095) / 4096 * 4096;
    Kept& kept = slot();
    if (kept.free && kept.bytes >= bytes) {
      data_ = kept.data, bytes_ = kept.bytes, kept.free = false;
      return;
    }
    data_ = static_cast<float*>(std::aligned_alloc(4096, bytes ? bytes : 4096));
    bytes_ = bytes;
    STD_TORCH_CHECK(data_ != nullptr, "out of memory: ", bytes, " bytes of scratch");
  }
  ~Scratch() {
    Kept& kept = slot();
    if (kept.data == data_) {
      kept.free = true;
    } else if (bytes_ <= kKeptBytes && kept.free && kept.bytes < bytes_) {
      std::free(kept.data);
      kept.data = data_, kept.bytes = bytes_;
    } else {
      std::free(data_);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  static constexpr size_t kKeptBytes = size_t{24} << 20;
  struct Kept {
    float* data = nullptr;
    size_t bytes = 0;
    bool free = true;
    ~Kept() { std::free(data); }
  };
  static Kept& slot() {
    static thread_local Kept kept;
    return kept;
  }
  float* data_ = nullptr;
  size_t bytes_ = 0;
};

// worker(next) on every thread; next() hands out 0 .. tasks - 1, then -1. Which thread runs a task
// never shows in a result.
template <typename Worker>
void run_tasks(int64_t tasks, bool parallel, const Worker& worker) {
  std::atomic<int64_t> counter{0};
  const auto next = [&]() -> int64_t {
    const int64_t task = counter.fetch_add(1, std::memory_order_relaxed);
    return task < tasks ? task : -1;
  };
  const int64_t threads = parallel ? std::min<int64_t>(tasks, torch::stable::get_num_threads())
                                   : std::min<int64_t>(tasks, 1);
  if (threads <= 1) {
    if (tasks > 0) worker(next);
    return;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { worker(next); });
}

}  // namespace petal
