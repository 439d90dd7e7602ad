// The weight gradients of expert_dispatch on the CPU: A^T B over all slots of an expert (or all
// rows and experts at once), A narrow and fp32 in memory, B the rows x or dout, gathered where
// sorted. A task owns a strip of B's columns and the whole sum of each of its elements, so that
// there are no partial results and no bit depends on how strips are cut. 128 slots at a time: B's
// strip becomes fp32 panels, every tile's sum starts from zero and is added to what is there.
// Traffic: A read once per strip, B once per slot.
#pragma once

#include "common/cpu/block.h"
#include "params.h"

namespace petal {
namespace PETAL_ISA {
namespace {

constexpr int64_t kChunk = 128;

typedef double vd __attribute__((vector_size(PETAL_VL * 8)));

int64_t sum_scratch(const ExpertSum& w, int64_t n) { return n * kNR * (w.cols + kChunk); }

template <typename T>
void take_rows(float* dst, const ExpertSum& w, int64_t slot, int64_t n, int64_t col, int64_t cols) {
  constexpr int64_t kAhead = 4, kLine = 64 / sizeof(T);
  const auto row = [&](int64_t i) {
    return from_row<const T>(w.rows, w.order ? w.order[slot + i] : slot + i) + col;
  };
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) {
      for (int64_t c = 0; c < cols; c += kLine) __builtin_prefetch(row(i + kAhead) + c, 0, 3);
    }
    to_panels(dst + i * kNR, row(i), w.rows.ld, 1, cols, kChunk);
  }
}

void add_columns(float* out, const ExpertSum& w, int64_t j0, int64_t j1) {
  for (int64_t c = j0 * kNR; c < least(w.cols, j1 * kNR); c += kVL, out += kVL) {
    vd total = {};
    for (int64_t i = w.begin; i < w.end; ++i) {
      total += __builtin_convertvector(load(w.a + i * w.lda + c), vd);
    }
    store(out, __builtin_convertvector(total, vf));
  }
}

void add_up(const ExpertSum& w, DType type, int64_t j0, int64_t j1, float* scratch) {
  if (!w.rows.p) return add_columns(scratch, w, j0, j1);
  float* strip = scratch + (j1 - j0) * w.cols * kNR;
  const int64_t col = j0 * kNR, cols = least(w.width, j1 * kNR) - col;
  memset(scratch, 0, (j1 - j0) * w.cols * kNR * sizeof(float));
  for (int64_t k = w.begin; k < w.end; k += kChunk) {
    const int64_t n = least(kChunk, w.end - k);
    PETAL_BY_TYPE(type, take_rows<T>(strip, w, k, n, col, cols));
    for (int64_t j = 0; j < j1 - j0; ++j) {
      for_row_tiles(w.cols, [&](auto height, int64_t i) __attribute__((always_inline)) {
        Tile<decltype(height)::value> t;
        clear(t);
        mac<true>(t, w.a + k * w.lda + i, w.lda, strip + j * kChunk * kNR, n);
        float* at = scratch + (j * w.cols + i) * kNR;
        each(t, [=](int r, vf& v0, vf& v1) __attribute__((always_inline)) {
          store(at + r * kNR, load(at + r * kNR) + v0);
          store(at + r * kNR + kVL, load(at + r * kNR + kVL) + v1);
        });
      });
    }
  }
}

}  // namespace
}  // namespace PETAL_ISA
}  // namespace petal
