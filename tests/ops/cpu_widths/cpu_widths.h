// Numbers, packing and reduction for cpu_widths.cpp.
#pragma once

#include <cstdlib>
#include <vector>

#include "common/cpu/isa.h"

using namespace petal;
using Floats = std::vector<float>;
using Results = std::vector<Floats>;

namespace {

constexpr int64_t kRows = 131, kRank = 21;

float* aligned(int64_t floats) {
  return static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64));
}

Floats numbers(int64_t n, unsigned seed) {
  Floats out(n);
  std::srand(seed);
  for (float& v : out) v = static_cast<float>(std::rand() % 2001 - 1000) / 1000.0f;
  return out;
}

struct Packed {
  float* data;
  Packed(const CpuOperands& k, const Floats& src, int64_t sk, int64_t sc, int64_t depth,
         int64_t cols) {
    const int64_t panels = (cols + k.panel - 1) / k.panel;
    data = aligned(panels * k.panel * depth);
    k.pack(data, src.data(), DType::kFloat32, sk, sc, depth, cols, 0, panels);
  }
};

Floats reduced(const CpuOperands& k, const Floats& partials, int64_t splits, int64_t rows,
               int64_t cols) {
  Floats out(rows * cols);
  const int64_t panels = (cols + k.panel - 1) / k.panel, panel = rows * k.panel;
  for (int64_t j = 0; j < panels; ++j) {
    k.reduce(out.data() + j * k.panel, DType::kFloat32, cols, 1, partials.data() + j * panel,
             splits, panels * panel, rows, cols - j * k.panel);
  }
  return out;
}

}  // namespace
