// What forward and backward of expert_dispatch share: rows of a block to and from panels, dot
// products with a few vectors, the router's arithmetic, the rows of each expert, the products over
// them.
//
// Wide blocks are fp32 panels [width / kNR][block][kNR]; r-wide ones are rows of floats.
#pragma once

#include "common/cpu/activation.h"
#include "common/cpu/block.h"
#include "params.h"

namespace petal {
namespace PETAL_ISA {
namespace {

// ---- a block of rows

PETAL_INLINE Span block_span(const ExpertArgs& a, int64_t block) {
  const int64_t row0 = block * a.block;
  return {row0, least(a.block, a.N - row0)};
}

void load_wide(float* dst, const ExpertArgs& a, const CpuRows& src, Span s, int64_t cols) {
  PETAL_BY_TYPE(a.type,
                to_panels(dst, from_row<const T>(src, s.row0), src.ld, s.rows, cols, a.block));
}

void store_wide(const ExpertArgs& a, const CpuRows& dst, const float* src, Span s, int64_t cols) {
  PETAL_BY_TYPE(a.type, {
    T* p = static_cast<T*>(dst.p);
    from_panels(p + s.row0 * dst.ld, dst.ld, src, a.block, s.rows, cols,
                may_stream(p, dst.ld, a.N * cols));
  });
}

void scale_wide(float* p, const ExpertArgs& a, float factor, int64_t rows, int64_t cols) {
  for (int64_t j = 0; j < n_panels(cols); ++j, p += a.block * kNR) {
    for (int64_t k = 0; k < rows * kNR; k += kVL) store(p + k, load(p + k) * factor);
  }
}

void clear_wide(float* p, const ExpertArgs& a, int64_t rows, int64_t cols) {
  for (int64_t j = 0; j < n_panels(cols); ++j) {
    memset(p + j * a.block * kNR, 0, rows * kNR * sizeof(float));
  }
}

// out[i * ld + e - first] = <row i, vector e>: rows in panels of `height`, vectors in panels of
// `count`. Four rows by two vectors at a time; at an end the last ones are done again.
void dots(float* out, int64_t ld, const float* p, int64_t height, int64_t rows,
          const float* vectors, int64_t count, int64_t first, int64_t last, int64_t width) {
  for (int64_t i = 0; i < rows; i += 4) {
    const int64_t i1 = least(i + 1, rows - 1), i2 = least(i + 2, rows - 1);
    const int64_t i3 = least(i + 3, rows - 1);
    for (int64_t e = first; e < last; e += 2) {
      const int64_t other = least(e + 1, last - 1);
      vf s00{}, s01{}, s10{}, s11{}, s20{}, s21{}, s30{}, s31{};
      for (int64_t j = 0; j < n_panels(width); ++j) {
        const float *x = p + j * height * kNR, *v = vectors + j * count * kNR;
        for (int64_t c = 0; c < kNR; c += kVL) {
          const vf v0 = load(v + e * kNR + c), v1 = load(v + other * kNR + c);
          const vf x0 = load(x + i * kNR + c), x1 = load(x + i1 * kNR + c);
          const vf x2 = load(x + i2 * kNR + c), x3 = load(x + i3 * kNR + c);
          s00 += x0 * v0, s01 += x0 * v1, s10 += x1 * v0, s11 += x1 * v1;
          s20 += x2 * v0, s21 += x2 * v1, s30 += x3 * v0, s31 += x3 * v1;
        }
      }
      const auto put = [&](int64_t row, vf a, vf b) __attribute__((always_inline)) {
        out[row * ld + e - first] = sum(a);
        out[row * ld + other - first] = sum(other == e ? a : b);
      };
      put(i, s00, s01), put(i1, s10, s11), put(i2, s20, s21), put(i3, s30, s31);
    }
  }
}

// ---- the router

// NaN is above all.
PETAL_INLINE bool above(float a, float b) { return a > b || (a != a && b == b); }

// The k largest of a row, of equal ones the first.
void choose(uint8_t* chosen, const float* logits, int64_t experts, int64_t k) {
  memset(chosen, 0, experts);
  for (; k > 0; --k) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (!chosen[e] && (best < 0 || above(logits[e], logits[best]))) best = e;
    }
    chosen[best] = 1;
  }
}

// Softmax over the chosen (null: over all), 0 elsewhere. g has room for whole vectors.
void softmax(float* g, const float* logits, const uint8_t* chosen, int64_t experts) {
  float top = -__builtin_inff(), total = 0.0f;
  for (int64_t e = 0; e < experts; ++e) {
    if ((!chosen || chosen[e]) && logits[e] > top) top = logits[e];
  }
  for (int64_t e = 0; e < experts; ++e) g[e] = logits[e] - top;
  for (int64_t e = 0; e < experts; e += kVL) store(g + e, exp_of(load(g + e)));
  for (int64_t e = 0; e < experts; ++e) {
    if (chosen && !chosen[e]) g[e] = 0.0f;
    total += g[e];
  }
  for (int64_t e = 0; e < experts; ++e) g[e] /= total;
}

// The choice of a row, or null: every expert.
PETAL_INLINE const uint8_t* choice_of(const ExpertArgs& a, int64_t row) {
  if (a.gate == ExpertGate::kTopK) return a.chosen + row * a.E;
  return a.given_choice ? a.given_choice + row / a.L * a.E : nullptr;
}

PETAL_INLINE bool is_in(const uint8_t* choice, int64_t e) { return choice == nullptr || choice[e]; }

struct Gates {
  float* exact;     // [block][padded(E)]
  float* rounded;   // to the activations' dtype
  int32_t* tokens;  // sorted: the rows of each expert, within the block
  int32_t* starts;  // [E + 1]: where an expert's begin
  int64_t* slots;   // [E]: of them, in backward
};

template <typename A>
Gates carve_gates(const ExpertArgs& a, A& arena) {
  Gates g = {};
  g.exact = arena.take(a.block * padded(a.E));
  g.rounded = arena.take(a.block * padded(a.E));
  if (!a.sorted) return g;
  g.tokens = reinterpret_cast<int32_t*>(arena.take(a.block * a.top_k));
  g.starts = reinterpret_cast<int32_t*>(arena.take(a.E + 1));
  g.slots = reinterpret_cast<int64_t*>(arena.take(2 * a.E));
  return g;
}

// Gates of a block's rows; logits and choice must be there.
void form_gates(Gates& g, const ExpertArgs& a, Span s) {
  for (int64_t i = 0; i < s.rows; ++i) {
    const int64_t row = s.row0 + i;
    const uint8_t* choice = choice_of(a, row);
    float* gate = g.exact + i * padded(a.E);
    if (a.gate == ExpertGate::kMean || a.gate == ExpertGate::kGiven) {
      for (int64_t e = 0; e < a.E; ++e) {
        const float given = a.gates ? a.gates[row / a.L * a.E + e] : 1.0f / static_cast<float>(a.E);
        gate[e] = is_in(choice, e) ? given : 0.0f;
      }
      continue;
    }
    softmax(gate, a.logits + row * a.E, a.renormalize ? choice : nullptr, a.E);
    for (int64_t e = 0; e < a.E; ++e) {
      if (!is_in(choice, e)) gate[e] = 0.0f;
    }
  }
  const int64_t n = s.rows * padded(a.E);
  memcpy(g.rounded, g.exact, n * sizeof(float));
  round_to(a.type, g.rounded, n);
}

// ---- the rows of a product

struct Group {
  int64_t index;          // of the weights: the expert, or 0 for all
  const int32_t* tokens;  // within the block; null: every row
  int64_t rows;
  int64_t slot;  // of its first row in z, dz and mixed
};

PETAL_INLINE int64_t n_groups(const ExpertArgs& a) { return a.sorted ? a.E : 1; }
PETAL_INLINE int64_t per_group(const ExpertArgs& a) { return a.sorted ? 1 : a.E; }
PETAL_INLINE int64_t z_width(const ExpertArgs& a) { return a.sorted ? a.R : a.downs * a.R; }
PETAL_INLINE int64_t t_width(const ExpertArgs& a) { return per_group(a) * a.R; }
PETAL_INLINE int64_t down_of(const ExpertArgs& a, const Group& g) {
  return a.downs == 1 ? 0 : g.index;
}
// Rows that vectors may run over the end of.
PETAL_INLINE int64_t narrow_ld(int64_t width) { return padded(width) + kNR; }

// The group's rows of a wide block: itself, or gathered into `gathered`.
const float* rows_of(float* gathered, const float* wide, const ExpertArgs& a, const Group& g,
                     int64_t cols) {
  if (!g.tokens) return wide;
  const int64_t panel = a.block * kNR;
  for (int64_t j = 0; j < n_panels(cols); ++j) {
    for (int64_t i = 0; i < g.rows; ++i) {
      const float* from = wide + j * panel + g.tokens[i] * kNR;
      store(gathered + j * panel + i * kNR, load(from));
      store(gathered + j * panel + i * kNR + kVL, load(from + kVL));
    }
  }
  return gathered;
}

// wide[tokens] += A B, A [rows, depth] in rows of ld floats.
void expand(float* wide, const ExpertArgs& a, const int32_t* tokens, int64_t rows,
            const float* from, int64_t ld, int64_t depth, const float* b, int64_t cols) {
  for (int64_t j = 0; j < n_panels(cols); ++j, wide += a.block * kNR) {
    for_row_tiles(rows, [&](auto height, int64_t i) __attribute__((always_inline)) {
      Tile<decltype(height)::value> t;
      clear(t);
      mac<false>(t, from + i * ld, ld, b + j * depth * kNR, depth);
      each(t, [=](int r, vf& v0, vf& v1) __attribute__((always_inline)) {
        float* at = wide + (tokens ? tokens[i + r] : i + r) * kNR;
        store(at, load(at) + v0);
        store(at + kVL, load(at + kVL) + v1);
      });
    });
  }
}

template <typename T>
PETAL_INLINE vf rounded(vf v) {
  if (Storage<T>::kFloat) return v;
  T tmp[kVL];
  store(tmp, v);
  return load(tmp);
}

}  // namespace
}  // namespace PETAL_ISA
}  // namespace petal
