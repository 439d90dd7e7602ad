// Host side: weights to packed panels, partial sums to gradients, on all threads.
#ifndef PETAL_CPU_PACK_H
#define PETAL_CPU_PACK_H

#include <algorithm>
#include <utility>

#include "cpu_torch.h"

namespace petal {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A right operand to be packed: B[depth, cols], element (k, c) at src[k * sk + c * sc].
struct Operand {
  const float** packed;
  const void* src;
  CpuType type;
  int64_t sk, sc, depth, cols;
};

class Packer {
 public:
  // rows_k: the contraction runs over dim 0 of t, else over dim 1.
  void add(const float** packed, const Tensor& t, const char* name, bool rows_k) {
    STD_TORCH_CHECK(t.dim() == 2, name, ": want a matrix, got ", t.dim(), " dimensions");
    const int k = rows_k ? 0 : 1;
    add(packed, t.const_data_ptr(), cpu_type(t, name), t.stride(k), t.stride(1 - k), t.size(k), t.size(1 - k));
  }
  void add(const float** packed, const void* src, CpuType type, int64_t sk, int64_t sc, int64_t depth, int64_t cols) {
    operands_.push_back({packed, src, type, sk, sc, depth, cols});
  }
  int64_t floats(int64_t panel) const {
    int64_t n = 0;
    for (const Operand& o : operands_) n += ceil_div(o.cols, panel) * panel * o.depth;
    return n;
  }
  void run(float* out, const CpuOperands& kernel, bool parallel) const {
    struct Job {
      const Operand* operand;
      float* dst;
      int64_t begin, end;
    };
    std::vector<Job> jobs;
    for (const Operand& o : operands_) {
      const int64_t panels = ceil_div(o.cols, kernel.panel);
      for (int64_t j = 0; j < panels; j += kPanelsPerJob) {
        jobs.push_back({&o, out, j, std::min(panels, j + kPanelsPerJob)});
      }
      *o.packed = out;
      out += panels * kernel.panel * o.depth;
    }
    run_tasks(static_cast<int64_t>(jobs.size()), parallel, [&](const auto& next) {
      for (int64_t i = next(); i >= 0; i = next()) {
        const Job& job = jobs[i];
        const Operand& o = *job.operand;
        kernel.pack(job.dst, o.src, o.type, o.sk, o.sc, o.depth, o.cols, job.begin, job.end);
      }
    });
  }

 private:
  static constexpr int64_t kPanelsPerJob = 4;
  std::vector<Operand> operands_;
};

// A gradient to be reduced from partials: [R, cols] as element (r, c) at data[r * sr + c * sc].
struct Gradient {
  void* data;
  CpuType type;
  int64_t sr, sc, cols;
  const float* partials;
};

inline void reduce_all(const std::vector<Gradient>& gradients, int64_t splits, int64_t R,
                       const CpuOperands& kernel, bool parallel) {
  std::vector<std::pair<const Gradient*, int64_t>> jobs;
  for (const Gradient& g : gradients) {
    for (int64_t j = 0; j < ceil_div(g.cols, kernel.panel); ++j) jobs.emplace_back(&g, j);
  }
  run_tasks(static_cast<int64_t>(jobs.size()), parallel, [&](const auto& next) {
    for (int64_t i = next(); i >= 0; i = next()) {
      const Gradient& g = *jobs[i].first;
      kernel.reduce(g.data, g.type, g.sr, g.sc, g.partials, splits, R, g.cols, jobs[i].second);
    }
  });
}

}  // namespace petal

#endif
