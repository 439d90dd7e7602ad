// What cpu_widths.cpp runs of expert_dispatch.
#pragma once

#include <algorithm>
#include <cmath>
#include <deque>
#include <utility>

#include "cpu_widths.h"
#include "expert_dispatch/cpu/params.h"

namespace {

// One call of expert_dispatch: 131 rows, rank 21, every expert's z its own or all the same.
struct Mixture {
  ExpertGate gate;
  bool sorted, renormalize;
  Activation activation;
  int64_t D, O, E, downs, top_k;
};
constexpr Mixture kMixtures[] = {
    {ExpertGate::kSoftmax, false, true, Activation::kGelu, 75, 75, 5, 5, 0},
    {ExpertGate::kTopK, false, false, Activation::kSilu, 40, 83, 6, 1, 2},
    {ExpertGate::kTopK, true, true, Activation::kGeluTanh, 75, 75, 7, 7, 2},
    {ExpertGate::kTopK, true, false, Activation::kIdentity, 83, 40, 3, 1, 1},
};

// Operands and results of one mixture on one table of kernels; results are NaN until written.
class Experts {
 public:
  Experts(const ExpertKernels& kernel, const Mixture& m)
      : kernel_(kernel),
        ops_(kernel.operands),
        m_(m),
        groups_(m.sorted ? m.E : 1),
        per_(m.sorted ? 1 : m.E),
        downs_(m.sorted ? m.downs : 1),
        width_(m.sorted ? kRank : m.downs * kRank),
        slots_(m.sorted ? kRows * m.top_k : kRows) {
    a_.type = DType::kFloat32;
    a_.N = kRows, a_.D = m.D, a_.R = kRank, a_.O = m.O, a_.E = m.E, a_.downs = m.downs;
    a_.top_k = m.top_k, a_.L = 1, a_.block = 4 * ops_.tile_rows;
    a_.blocks = (kRows + a_.block - 1) / a_.block;
    a_.activation = m.activation, a_.gate = m.gate, a_.sorted = m.sorted;
    a_.renormalize = m.renormalize, a_.add_input = m.D == m.O, a_.up_biased = true;
    a_.keep = 0.6f, a_.mix = 0.4f;
    a_.mixed_ld = per_ * (kRank + 1) + 16, a_.dz_ld = width_ + m.E + 16;
  }

  Results run() {
    const Floats router = numbers(m_.E * m_.D, 1), noise = numbers(kRows * m_.E, 2);
    const Floats x = numbers(kRows * m_.D, 3), dout = numbers(kRows * m_.O, 4);
    const Floats down = numbers(m_.downs * kRank * m_.D, 5), up = numbers(m_.E * kRank * m_.O, 6);
    const Floats up_bias = numbers(m_.E * m_.O, 7), down_bias = numbers(m_.downs * kRank, 8);
    std::vector<uint8_t> chosen(kRows * m_.E);
    a_.x = {const_cast<float*>(x.data()), m_.D}, a_.dout = {const_cast<float*>(dout.data()), m_.O};
    a_.noise = noise.data(), a_.chosen = chosen.data(), a_.logits = result(kRows * m_.E);
    a_.router = packed(router, m_.D), a_.up_bias = packed(up_bias, m_.O);
    std::vector<const float*> down_t, bias, up_t, ups, downs;
    for (int64_t g = 0; g < downs_; ++g) {
      const Floats own = part(down, g, width_ * m_.D);
      down_t.push_back(Packed(ops_, own, 1, m_.D, m_.D, width_).data);
      bias.push_back(packed(part(down_bias, g, width_), width_));
      downs.push_back(packed(m_.sorted ? own : joined(own, router), m_.D));
    }
    for (int64_t g = 0; g < groups_; ++g) {  // B^T of each expert: [R, O]
      const Floats own = part(up, g, per_ * kRank * m_.O);
      up_t.push_back(packed(joined(own, part(up_bias, g, per_ * m_.O)), m_.O));
      ups.push_back(Packed(ops_, own, 1, m_.O, m_.O, per_ * kRank).data);
    }
    a_.down_t = down_t.data(), a_.down_bias = bias.data(), a_.up_t = up_t.data();
    a_.up = ups.data(), a_.down = downs.data();
    a_.out = {result(kRows * m_.O), m_.O};
    forward();
    backward();
    return all_;
  }

 private:
  static Floats part(const Floats& all, int64_t index, int64_t n) {
    return Floats(all.begin() + index * n, all.begin() + (index + 1) * n);
  }
  static Floats joined(Floats one, const Floats& other) {
    one.insert(one.end(), other.begin(), other.end());
    return one;
  }
  float* packed(const Floats& rows, int64_t cols) {
    return Packed(ops_, rows, cols, 1, static_cast<int64_t>(rows.size()) / cols, cols).data;
  }
  float* fresh(int64_t n) {
    kept_.emplace_back(n, NAN);
    return kept_.back().data();
  }
  float* result(int64_t n) {
    results_.push_back({fresh(n), n});
    return results_.back().first;
  }

  // Sorted: each expert's slots, block after block, as the host moves them.
  void forward() {
    const int64_t ld = width_;
    a_.z = {fresh(slots_ * ld), ld};
    std::vector<int32_t> order(slots_), counts(a_.blocks * m_.E);
    a_.order = order.data(), a_.counts = counts.data();
    float* scratch = aligned(kernel_.forward_scratch(a_));
    for (int64_t i = 0; i < a_.blocks; ++i) kernel_.forward(a_, i, scratch);
    for (const auto& [data, n] : results_) all_.emplace_back(data, data + n);
    results_.clear();
    if (!m_.sorted) return;
    float* z = fresh(slots_ * ld);
    for (int64_t e = 0; e < m_.E; ++e) {
      offsets_.push_back(static_cast<int32_t>(order_.size()));
      for (int64_t i = 0; i < a_.blocks; ++i) {
        int64_t from = i * a_.block * m_.top_k;
        for (int64_t k = 0; k < e; ++k) from += counts[i * m_.E + k];
        const int64_t n = counts[i * m_.E + e];
        std::copy_n(static_cast<float*>(a_.z.p) + from * ld, n * ld, z + order_.size() * ld);
        order_.insert(order_.end(), order.begin() + from, order.begin() + from + n);
      }
    }
    offsets_.push_back(static_cast<int32_t>(order_.size()));
    a_.z.p = z, a_.order = order_.data(), a_.offsets = offsets_.data();
  }

  void backward() {
    if (!m_.sorted) a_.order = nullptr;
    a_.need_t = a_.need_gates = true;
    a_.dx = {result(kRows * m_.D), m_.D};
    a_.dz = fresh(slots_ * a_.dz_ld + 16), a_.mixed = fresh(slots_ * a_.mixed_ld + 16);
    a_.dl_ld = m_.sorted ? m_.E + 16 : a_.dz_ld;
    a_.dl = m_.sorted ? fresh(kRows * a_.dl_ld + 16) : a_.dz + width_;
    float* scratch = aligned(kernel_.backward_scratch(a_));
    for (int64_t i = 0; i < a_.blocks; ++i) kernel_.backward(a_, i, scratch);
    for (const auto& [data, n] : results_) all_.emplace_back(data, data + n);
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t begin = m_.sorted ? offsets_[g] : 0, end = m_.sorted ? offsets_[g + 1] : kRows;
      add({a_.dz, a_.dz_ld, width_, a_.x, m_.D, a_.order, begin, end});
      add({a_.dz, a_.dz_ld, width_, {}, 0, nullptr, begin, end});
      add({a_.mixed, a_.mixed_ld, per_ * (kRank + 1), a_.dout, m_.O, a_.order, begin, end});
    }
    add({a_.dl, a_.dl_ld, m_.E, a_.x, m_.D, nullptr, 0, kRows});
  }

  void add(const ExpertSum& sum) {
    const int64_t rows = sum.rows.p ? sum.cols : 1, cols = sum.rows.p ? sum.width : sum.cols;
    const int64_t panels = (cols + ops_.panel - 1) / ops_.panel;
    Floats found(kernel_.sum_scratch(sum, panels), NAN);
    kernel_.sum(sum, a_.type, 0, panels, found.data());
    all_.push_back(reduced(ops_, found, 1, rows, cols));
  }

  const ExpertKernels& kernel_;
  const CpuOperands& ops_;
  const Mixture& m_;
  const int64_t groups_, per_, downs_, width_, slots_;
  ExpertArgs a_ = {};
  std::vector<int32_t> order_, offsets_;
  std::deque<Floats> kept_;
  std::vector<std::pair<float*, int64_t>> results_;
  Results all_;
};

}  // namespace
