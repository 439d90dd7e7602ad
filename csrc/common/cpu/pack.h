// Host side: weights to packed panels, partial sums to gradients, on all threads.
#pragma once

#include <algorithm>
#include <utility>

#include "common/dispatch.h"
#include "host.h"

namespace petal {

// A matrix [rows, cols] anywhere in memory, strides in elements.
struct Matrix {
  void* data;
  DType type;
  int64_t rows, cols, row_stride, col_stride;
  Matrix transposed() const { return {data, type, cols, rows, col_stride, row_stride}; }
};

// What a parameter is only read through; gradients are written through it.
inline Matrix matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": want a matrix, got ", t.dim(), " dimensions");
  void* data = const_cast<void*>(t.const_data_ptr());
  return {data, dtype_of(t, name), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// t[k] of a tensor of three dimensions.
inline Matrix slice(const Tensor& t, int64_t k, const char* name) {
  STD_TORCH_CHECK(t.dim() == 3, name, ": want three dimensions, got ", t.dim());
  const DType type = dtype_of(t, name);
  char* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  data += k * t.stride(0) * static_cast<int64_t>(type_bytes(type));
  return {data, type, t.size(1), t.size(2), t.stride(1), t.stride(2)};
}

// Right operands to be packed: the contraction runs over a matrix's rows, or over those of several
// matrices, one below the other.
class Packer {
 public:
  void add(const float** packed, const Matrix& m) { add(packed, std::vector<Matrix>{m}); }
  void add(const float** packed, std::vector<Matrix> parts) {
    int64_t rows = 0;
    for (const Matrix& m : parts) rows += m.rows;
    operands_.push_back({packed, std::move(parts), rows});
  }
  int64_t floats(int64_t panel) const {
    int64_t n = 0;
    for (const Operand& o : operands_) n += o.panels(panel) * panel * o.rows;
    return n;
  }
  void run(float* out, const CpuOperands& kernel, bool parallel) const {
    struct Job {
      const Operand* o;
      float* dst;
      int64_t begin, end;
    };
    std::vector<Job> jobs;
    for (const Operand& o : operands_) {
      const int64_t panels = o.panels(kernel.panel);
      for (int64_t j = 0; j < panels; j += kPanelsPerJob) {
        jobs.push_back({&o, out, j, std::min(panels, j + kPanelsPerJob)});
      }
      *o.packed = out;
      out += panels * kernel.panel * o.rows;
    }
    run_tasks(static_cast<int64_t>(jobs.size()), parallel, [&](const auto& next) {
      for (int64_t i = next(); i >= 0; i = next()) {
        const auto& [o, dst, begin, end] = jobs[i];
        for (int64_t j = begin; j < end; ++j) {
          float* at = dst + j * o->rows * kernel.panel;
          for (const Matrix& m : o->parts) {
            // A panel is written at its index; this one lies where its operand says.
            kernel.pack(at - j * m.rows * kernel.panel, m.data, m.type, m.row_stride, m.col_stride,
                        m.rows, m.cols, j, j + 1);
            at += m.rows * kernel.panel;
          }
        }
      }
    });
  }

 private:
  static constexpr int64_t kPanelsPerJob = 4;
  struct Operand {
    const float** packed;
    std::vector<Matrix> parts;
    int64_t rows;
    int64_t panels(int64_t panel) const { return ceil_div(parts[0].cols, panel); }
  };
  std::vector<Operand> operands_;
};

// Weight gradients: one fp32 partial per split of the work, then their sum in the order of splits.
// Gradients of matrices of equal width may share their partials, one below the other.
class Gradients {
 public:
  Gradients(int64_t splits, int64_t panel) : splits_(splits), panel_(panel) {}
  void add(float** partials, const Matrix& m) { add(partials, std::vector<Matrix>{m}); }
  void add(float** partials, std::vector<Matrix> parts) {
    int64_t rows = 0;
    for (const Matrix& m : parts) rows += m.rows;
    items_.push_back({partials, std::move(parts), rows});
  }
  int64_t floats() const {
    int64_t n = 0;
    for (const Item& item : items_) n += splits_ * floats_of(item);
    return n;
  }
  void place(float* at) {
    for (Item& item : items_) {
      *item.partials = at;
      at += splits_ * floats_of(item);
    }
  }
  void reduce(const CpuOperands& kernel, bool parallel) const {
    std::vector<std::pair<const Item*, int64_t>> jobs;
    for (const Item& item : items_) {
      for (int64_t j = 0; j < panels(item); ++j) jobs.emplace_back(&item, j);
    }
    run_tasks(static_cast<int64_t>(jobs.size()), parallel, [&](const auto& next) {
      for (int64_t i = next(); i >= 0; i = next()) {
        const auto& [item, j] = jobs[i];
        const float* from = *item->partials + j * item->rows * panel_;
        for (const Matrix& m : item->parts) {
          char* to = static_cast<char*>(m.data);
          to += j * panel_ * m.col_stride * static_cast<int64_t>(type_bytes(m.type));
          kernel.reduce(to, m.type, m.row_stride, m.col_stride, from, splits_, floats_of(*item),
                        m.rows, m.cols - j * panel_);
          from += m.rows * panel_;
        }
      }
    });
  }

 private:
  struct Item {
    float** partials;
    std::vector<Matrix> parts;
    int64_t rows;
  };
  int64_t panels(const Item& item) const { return ceil_div(item.parts[0].cols, panel_); }
  int64_t floats_of(const Item& item) const { return panels(item) * panel_ * item.rows; }
  int64_t splits_, panel_;
  std::vector<Item> items_;
};

}  // namespace petal
