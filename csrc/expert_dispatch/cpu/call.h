// Host side of expert_dispatch on the CPU: one call's checked arguments and the operands to be
// packed for it.
#pragma once

#include "common/cpu/pack.h"
#include "expert_dispatch/arguments.h"
#include "params.h"

namespace petal {
namespace {

using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;
using Optionals = std::vector<Optional>;

enum Result { kOut, kZ, kLogits, kChosen, kOrder, kOffsets, kResults };

constexpr int64_t kBlockBytes = 704 << 10;  // of a block's rows: L2 holds them and some weights
constexpr int64_t kBlockRows = 192;
constexpr int64_t kLeastRows = 24;
constexpr int64_t kSerialWork = 1 << 20;  // multiply-adds below which threads do not pay
constexpr int64_t kSlack = 16;            // floats that vectors may reach beyond a row

float* floats(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(dtype_of(t, name) == DType::kFloat32 && t.is_contiguous(), name,
                  ": want contiguous float32");
  return static_cast<float*>(const_cast<void*>(t.const_data_ptr()));
}

template <typename T>
T* whole(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous(), name, ": want it contiguous");
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

int64_t round_up(int64_t n) { return ceil_div(n, kSlack) * kSlack; }

// Elements [first, first + n) of a contiguous tensor, as a row.
Matrix piece(const Tensor& t, const char* name, int64_t first, int64_t n) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() >= first + n, name, ": want ", first + n,
                  " elements, contiguous");
  char* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  const DType type = dtype_of(t, name);
  return {data + first * static_cast<int64_t>(type_bytes(type)), type, 1, n, 0, 1};
}

Matrix rows_of(const Matrix& m, int64_t first, int64_t rows) {
  char* data = static_cast<char*>(m.data);
  data += first * m.row_stride * static_cast<int64_t>(type_bytes(m.type));
  return {data, m.type, rows, m.cols, m.row_stride, m.col_stride};
}

// One call's arguments and the operands to be packed for it, which point into the arguments.
struct Call {
  const Optionals& tensors;
  ExpertArgs a = {};
  Packer packer;
  std::vector<const float*> down, down_bias, up;

  Call(const Optionals& given, const Tensor& like, const ExpertSettings& s) : tensors(given) {
    STD_TORCH_CHECK(given.size() == Input::kCount && given[Input::kUp] && given[Input::kDown],
                    "tensors: want ", static_cast<int>(Input::kCount), ", among them down and up");
    a.type = dtype_of(like, "x"), a.N = like.size(0);
    a.E = given[Input::kUp]->size(0), a.O = given[Input::kUp]->size(1),
    a.R = given[Input::kUp]->size(2);
    a.downs = given[Input::kDown]->size(0), a.D = given[Input::kDown]->size(2);
    a.top_k = s.top_k, a.L = s.tokens_per_gate;
    a.activation = s.activation, a.gate = s.gate;
    a.sorted = s.sorted, a.renormalize = s.renormalize, a.add_input = s.add_input;
    a.keep = s.keep, a.mix = s.mix;
    STD_TORCH_CHECK(given[Input::kDown]->is_contiguous(), "down: want it contiguous");
    STD_TORCH_CHECK(!a.sorted || a.top_k > 0, "sorted: want a choice");
    if (given[Input::kX]) a.x = rows(*given[Input::kX], "x", a.D);
    if (given[Input::kBase]) a.base = rows(*given[Input::kBase], "base", a.O);
    if (given[Input::kNoise]) a.noise = floats(*given[Input::kNoise], "noise");
    if (given[Input::kGates]) a.gates = floats(*given[Input::kGates], "gates");
    if (given[Input::kChosen]) {
      a.given_choice = whole<uint8_t>(*given[Input::kChosen], ScalarType::Bool, "chosen");
      check_choice();
    }
    a.up_biased = given[Input::kUpBias].has_value();
    const int64_t each = per_group();
    a.mixed_ld = round_up(each * a.R + std::max(each, kSlack));
    a.dz_ld = round_up(z_width() + std::max(a.sorted ? 0 : a.E, kSlack));
    down.resize(down_groups()), down_bias.resize(down_groups()), up.resize(groups());
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  int64_t groups() const { return a.sorted ? a.E : 1; }
  int64_t per_group() const { return a.sorted ? 1 : a.E; }
  int64_t down_groups() const { return a.sorted ? a.downs : 1; }
  int64_t z_width() const { return a.sorted ? a.R : a.downs * a.R; }
  int64_t slots() const { return a.sorted ? a.N * a.top_k : a.N; }
  bool worth_threads() const { return slots() * per_group() * a.R * (a.D + a.O) > kSerialWork; }

  // A sorted z has room for so many; the operator makes the choice, so this is only a guard.
  void check_choice() const {
    const int64_t samples = tensors[Input::kChosen]->numel() / a.E;
    STD_TORCH_CHECK(samples * a.L == a.N, "chosen: want a row for each ", a.L, " of ", a.N,
                    " rows");
    for (int64_t i = 0; a.sorted && i < samples; ++i) {
      int64_t n = 0;
      for (int64_t e = 0; e < a.E; ++e) n += a.given_choice[i * a.E + e];
      STD_TORCH_CHECK(n <= a.top_k, "chosen: want at most ", a.top_k, " experts, got ", n);
    }
  }
  CpuRows rows(const Tensor& t, const char* name, int64_t width) const {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == a.N && t.size(1) == width, name, ": want [", a.N,
                    ", ", width, "]");
    STD_TORCH_CHECK(dtype_of(t, name) == a.type, name, ": its dtype differs from the activations'");
    return {const_cast<void*>(t.const_data_ptr()), row_stride(t, name)};
  }
  // down of a group: [z_width, D].
  Matrix down_of(const Tensor& t, int64_t group) const {
    Matrix m = slice(t, group, "down");
    m.rows = z_width();
    m.row_stride = m.cols;  // with a rank of 1 the stride between its rows says nothing
    return m;
  }
  // What forward multiplies with: down^T and down_bias; up^T, the biases of a group's experts below
  // it.
  void pack_forward() {
    const Optional &bias = tensors[Input::kDownBias], &up_bias = tensors[Input::kUpBias];
    for (int64_t g = 0; g < down_groups(); ++g) {
      packer.add(&down[g], down_of(*tensors[Input::kDown], g).transposed());
      if (bias) packer.add(&down_bias[g], piece(*bias, "down_bias", g * z_width(), z_width()));
    }
    for (int64_t g = 0; g < groups(); ++g) {
      std::vector<Matrix> parts;
      for (int64_t e = 0; e < per_group(); ++e) {
        parts.push_back(slice(*tensors[Input::kUp], g + e, "up").transposed());
      }
      if (up_bias) parts.push_back(rows_of(matrix(*up_bias, "up_bias"), g, per_group()));
      packer.add(&up[g], std::move(parts));
    }
    if (tensors[Input::kRouter]) packer.add(&a.router, matrix(*tensors[Input::kRouter], "router"));
    const Optional& router_bias = tensors[Input::kRouterBias];
    if (router_bias) packer.add(&a.router_bias, piece(*router_bias, "router_bias", 0, a.E));
    a.down_t = down.data(), a.up_t = up.data();
    if (bias) a.down_bias = down_bias.data();
  }
  // What backward multiplies with: up; for dx down and the router, stationary below it.
  void pack_backward(const Optional& flat_up, bool routed, bool wants_x) {
    for (int64_t g = 0; a.need_t && g < groups(); ++g) {
      STD_TORCH_CHECK(a.sorted || flat_up, "flat_up: want it with the stationary plan");
      packer.add(&up[g],
                 a.sorted ? slice(*tensors[Input::kUp], g, "up") : matrix(*flat_up, "flat_up"));
    }
    const Optional& up_bias = tensors[Input::kUpBias];
    if (a.need_gates && up_bias) packer.add(&a.up_bias, matrix(*up_bias, "up_bias"));
    for (int64_t g = 0; wants_x && g < down_groups(); ++g) {
      std::vector<Matrix> parts = {down_of(*tensors[Input::kDown], g)};
      if (routed && !a.sorted) parts.push_back(matrix(*tensors[Input::kRouter], "router"));
      packer.add(&down[g], std::move(parts));
    }
    if (wants_x && routed && a.sorted)
      packer.add(&a.router, matrix(*tensors[Input::kRouter], "router"));
    a.up = up.data(), a.down = down.data();
  }
  // Rows of a block with `wide` columns of fp32 per row.
  void cut_blocks(const CpuOperands& operands, int64_t wide) {
    const int64_t most = std::clamp<int64_t>(kBlockBytes / 4 / wide, kLeastRows, kBlockRows);
    a.block = most / operands.tile_rows * operands.tile_rows;
    a.blocks = ceil_div(a.N, a.block);
  }
};

}  // namespace
}  // namespace petal
