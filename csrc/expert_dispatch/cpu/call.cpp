// expert_dispatch on the CPU: row blocks and sums to threads, the experts' places of a sorted z,
// registration.
#include <cstring>

#include "call.h"

namespace petal {
namespace {

const ExpertKernels& kernels() {
  switch (current_isa()) {
#if defined(PETAL_BUILT_AVX512)
    case Isa::kAvx512: return avx512::expert_kernels();
#endif
#if defined(PETAL_BUILT_AVX2)
    case Isa::kAvx2: return avx2::expert_kernels();
#endif
    default: return generic::expert_kernels();
  }
}

// Every block's runs of slots to the experts' places; blocks ascend within an expert.
void place(const Call& c, const Tensors& results, bool parallel) {
  const ExpertArgs& a = c.a;
  const int64_t bytes = a.R * static_cast<int64_t>(type_bytes(a.type));
  int32_t* offsets = whole<int32_t>(results[kOffsets], ScalarType::Int, "offsets");
  int32_t* order = whole<int32_t>(results[kOrder], ScalarType::Int, "order");
  std::vector<int32_t> starts(a.blocks * a.E);
  int32_t n = 0;
  for (int64_t e = 0; e < a.E; ++e) {
    offsets[e] = n;
    for (int64_t i = 0; i < a.blocks; ++i) {
      starts[i * a.E + e] = n;
      n += a.counts[i * a.E + e];
    }
  }
  offsets[a.E] = n;
  std::fill(order + n, order + c.slots(), -1);
  char* z = static_cast<char*>(const_cast<void*>(results[kZ].const_data_ptr()));
  run_tasks(a.blocks, parallel, [&](const auto& next) {
    for (int64_t i = next(); i >= 0; i = next()) {
      int64_t from = i * a.block * a.top_k;
      for (int64_t e = 0; e < a.E; ++e) {
        const int64_t count = a.counts[i * a.E + e], to = starts[i * a.E + e];
        std::memcpy(z + to * bytes, static_cast<char*>(a.z.p) + from * bytes, count * bytes);
        std::copy_n(a.order + from, count, order + to);
        from += count;
      }
    }
  });
}

// results: out, z, logits, chosen, order, offsets; those that this call does not have are empty.
void forward(Optionals tensors, std::vector<int64_t> codes, std::vector<double> numbers,
             Tensors results) {
  const ExpertKernels& kernel = kernels();
  STD_TORCH_CHECK(
      results.size() == kResults && tensors.size() == Input::kCount && tensors[Input::kX],
      "want x and six results");
  Call c(tensors, *tensors[Input::kX], expert_settings(codes, numbers));
  ExpertArgs& a = c.a;
  const bool sorted = a.sorted;
  a.out = c.rows(results[kOut], "out", a.O);
  if (tensors[Input::kRouter]) a.logits = floats(results[kLogits], "logits");
  if (a.gate == ExpertGate::kTopK) {
    a.chosen = whole<uint8_t>(results[kChosen], ScalarType::Bool, "chosen");
  }
  c.pack_forward();
  c.cut_blocks(kernel.operands,
               std::max(a.D, a.O) + (sorted ? a.top_k * a.mixed_ld : c.z_width() + a.mixed_ld));
  const bool save = results[kZ].numel() > 0, moved = save && sorted;
  const int64_t packed = c.packer.floats(kernel.operands.panel);
  const int64_t z = moved ? round_up(c.slots() * a.R) : 0, order = moved ? c.slots() : 0;
  Scratch work(packed + z + order + (moved ? a.blocks * a.E : 0));
  if (moved) {
    a.z = {work.data() + packed, a.R};
    a.order = reinterpret_cast<int32_t*>(work.data() + packed + z);
    a.counts = a.order + order;
  } else if (save) {
    a.z = c.rows(results[kZ], "z", c.z_width());
  }
  const bool parallel = c.worth_threads();
  c.packer.run(work.data(), kernel.operands, parallel);
  run_tasks(a.blocks, parallel, [&](const auto& next) {
    int64_t i = next();
    if (i < 0) return;
    Scratch scratch(kernel.forward_scratch(a));
    for (; i >= 0; i = next()) kernel.forward(a, i, scratch.data());
  });
  if (moved) place(c, results, parallel);
}

constexpr int64_t kStripBytes = 640 << 10;  // of a strip of a weight gradient and its operands

// Weight gradients: what is to be summed, and where its rows go.
class Sums {
 public:
  struct Target {
    int64_t first;
    Matrix m;
  };
  void add(const ExpertSum& sum, std::vector<Target> targets) {
    items_.push_back({sum, std::move(targets)});
  }
  void run(const ExpertKernels& kernel, DType type, bool parallel) const {
    struct Job {
      const Item* item;
      int64_t begin, end;
    };
    const int64_t panel = kernel.operands.panel;
    int64_t total = 0, scratch = 0;
    for (const Item& item : items_) total += panels(item, panel);
    // A strip never changes a result, so its width may depend on the number of threads.
    const int64_t fair = ceil_div(total, 4 * (parallel ? torch::stable::get_num_threads() : 1));
    std::vector<Job> jobs;
    for (const Item& item : items_) {
      const int64_t fits = kStripBytes / 4 / std::max<int64_t>(kernel.sum_scratch(item.sum, 1), 1);
      const int64_t strip = std::max<int64_t>(1, std::min(fits, fair)), n = panels(item, panel);
      for (int64_t j = 0; j < n; j += strip) jobs.push_back({&item, j, std::min(n, j + strip)});
      scratch = std::max(scratch, kernel.sum_scratch(item.sum, std::min(strip, n)));
    }
    run_tasks(static_cast<int64_t>(jobs.size()), parallel, [&](const auto& next) {
      int64_t i = next();
      if (i < 0) return;
      Scratch work(scratch);
      for (; i >= 0; i = next()) {
        const auto& [item, begin, end] = jobs[i];
        kernel.sum(item->sum, type, begin, end, work.data());
        const int64_t depth = item->sum.rows.p ? item->sum.cols : 1;
        for (int64_t j = begin; j < end; ++j) {
          for (const auto& [first, m] : item->targets) {
            char* to = static_cast<char*>(m.data);
            to += j * panel * m.col_stride * static_cast<int64_t>(type_bytes(m.type));
            kernel.operands.reduce(to, m.type, m.row_stride, m.col_stride,
                                   work.data() + ((j - begin) * depth + first) * panel, 1, 0,
                                   m.rows, m.cols - j * panel);
          }
        }
      }
    });
  }

 private:
  struct Item {
    ExpertSum sum;
    std::vector<Target> targets;
  };
  static int64_t panels(const Item& item, int64_t panel) {
    return ceil_div(item.sum.rows.p ? item.sum.width : item.sum.cols, panel);
  }
  std::vector<Item> items_;
};

// The sums that the wanted gradients are; everything they read is there when they run.
Sums gradients_of(const Call& c, const Tensors& grads) {
  const ExpertArgs& a = c.a;
  Sums sums;
  const auto wanted = [&](Input::Name name) { return grads[name].numel() > 0; };
  const auto slots = [&](int64_t group, bool all) -> std::pair<int64_t, int64_t> {
    if (!a.sorted) return {0, a.N};
    return {a.offsets[all ? 0 : group], a.offsets[all ? a.E : group + 1]};
  };
  const bool beside = wanted(Input::kRouter) && !a.sorted;  // dl's columns follow dz's
  for (int64_t g = 0; g < c.down_groups(); ++g) {
    const auto [begin, end] = slots(g, a.downs == 1);
    const int64_t width = c.z_width(), first = wanted(Input::kDown) ? 0 : width;
    const int64_t cols = (wanted(Input::kDown) ? width : 0) + (beside ? a.E : 0);
    std::vector<Sums::Target> targets;
    if (wanted(Input::kDown)) targets.push_back({0, c.down_of(grads[Input::kDown], g)});
    if (beside) targets.push_back({width - first, matrix(grads[Input::kRouter], "router")});
    if (cols) {
      sums.add({a.dz + first, a.dz_ld, cols, a.x, a.D, a.order, begin, end}, std::move(targets));
    }
    if (!wanted(Input::kDownBias)) continue;
    sums.add({a.dz, a.dz_ld, width, {}, 0, nullptr, begin, end},
             {{0, piece(grads[Input::kDownBias], "down_bias", g * width, width)}});
  }
  for (int64_t g = 0; a.mixed && g < c.groups(); ++g) {
    const auto [begin, end] = slots(g, false);
    const int64_t each = c.per_group(), width = each * a.R, first = wanted(Input::kUp) ? 0 : width;
    const int64_t cols = (wanted(Input::kUp) ? width : 0) + (wanted(Input::kUpBias) ? each : 0);
    std::vector<Sums::Target> targets;
    for (int64_t e = 0; wanted(Input::kUp) && e < each; ++e) {
      targets.push_back({e * a.R, slice(grads[Input::kUp], g + e, "up").transposed()});
    }
    if (wanted(Input::kUpBias)) {
      targets.push_back(
          {width - first, rows_of(matrix(grads[Input::kUpBias], "up_bias"), g, each)});
    }
    sums.add({a.mixed + first, a.mixed_ld, cols, a.dout, a.O, a.order, begin, end},
             std::move(targets));
  }
  if (wanted(Input::kRouter) && a.sorted) {
    sums.add({a.dl, a.dl_ld, a.E, a.x, a.D, nullptr, 0, a.N},
             {{0, matrix(grads[Input::kRouter], "router")}});
  }
  if (wanted(Input::kRouterBias)) {
    sums.add({a.dl, a.dl_ld, a.E, {}, 0, nullptr, 0, a.N},
             {{0, piece(grads[Input::kRouterBias], "router_bias", 0, a.E)}});
  }
  if (wanted(Input::kGates) && a.L > 1) {
    for (int64_t i = 0; i < a.N / a.L; ++i) {
      sums.add({a.dgates, a.E, a.E, {}, 0, nullptr, i * a.L, (i + 1) * a.L},
               {{0, piece(grads[Input::kGates], "gates", i * a.E, a.E)}});
    }
  }
  return sums;
}

// saved: z, logits, chosen, order, offsets, or empty; flat_up: stationary, up as [O, E r].
// grads: in the order of the tensors, empty where not wanted; those of noise and gates are fp32.
void backward(Optionals tensors, std::vector<int64_t> codes, std::vector<double> numbers,
              Tensor dout, Optional flat_up, Optional dlogits, Tensors saved, Tensors grads) {
  const ExpertKernels& kernel = kernels();
  STD_TORCH_CHECK(saved.size() == kResults - 1 && grads.size() == Input::kCount,
                  "want five saved tensors and ", static_cast<int>(Input::kCount), " gradients");
  Call c(tensors, dout, expert_settings(codes, numbers));
  ExpertArgs& a = c.a;
  const bool sorted = a.sorted;
  a.dout = c.rows(dout, "dout", a.O);
  const auto kept = [&](Result r) -> const Tensor& { return saved[r - kZ]; };
  if (kept(kLogits).numel()) a.logits = floats(kept(kLogits), "logits");
  if (kept(kChosen).numel()) a.chosen = whole<uint8_t>(kept(kChosen), ScalarType::Bool, "chosen");
  a.z = {const_cast<void*>(kept(kZ).const_data_ptr()), row_stride(kept(kZ), "z")};
  if (sorted) {
    a.order = whole<int32_t>(kept(kOrder), ScalarType::Int, "order");
    a.offsets = whole<int32_t>(kept(kOffsets), ScalarType::Int, "offsets");
  }
  if (dlogits) a.dlogits = floats(*dlogits, "dlogits");
  const auto wanted = [&](Input::Name name) { return grads[name].numel() > 0; };
  const bool routed =
      tensors[Input::kRouter] && (wanted(Input::kX) || wanted(Input::kRouter) ||
                                  wanted(Input::kRouterBias) || wanted(Input::kNoise));
  const bool need_dz =
      wanted(Input::kX) || wanted(Input::kDown) || wanted(Input::kDownBias) || (routed && !sorted);
  const bool need_mixed = wanted(Input::kUp) || wanted(Input::kUpBias);
  a.need_gates = routed || wanted(Input::kGates);
  a.need_t = need_dz || a.need_gates;
  if (wanted(Input::kX)) a.dx = c.rows(grads[Input::kX], "x", a.D);
  if (wanted(Input::kNoise)) a.dnoise = floats(grads[Input::kNoise], "noise");
  c.pack_backward(flat_up, routed, wanted(Input::kX));
  const int64_t packed = c.packer.floats(kernel.operands.panel);
  const bool own_dgates = wanted(Input::kGates) && a.L > 1;
  if (wanted(Input::kGates) && !own_dgates) a.dgates = floats(grads[Input::kGates], "gates");
  if (routed && sorted) a.dl_ld = round_up(a.E);
  const int64_t dz = need_dz ? c.slots() * a.dz_ld : 0,
                mixed = need_mixed ? c.slots() * a.mixed_ld : 0;
  const int64_t dl = round_up(a.N * a.dl_ld);
  Scratch work(packed + dz + mixed + dl + (own_dgates ? a.N * a.E : 0) + kSlack);
  float* at = work.data() + packed;
  if (need_dz) a.dz = at;
  if (need_mixed) a.mixed = at + dz;
  if (routed && sorted) a.dl = at + dz + mixed;
  if (routed && !sorted) a.dl = a.dz + c.z_width(), a.dl_ld = a.dz_ld;
  if (own_dgates) a.dgates = at + dz + mixed + dl;
  c.cut_blocks(kernel.operands, std::max(a.D, a.O) + (sorted ? a.top_k * (a.dz_ld + a.mixed_ld)
                                                             : 2 * a.E * a.R + c.z_width()));
  const bool parallel = c.worth_threads();
  c.packer.run(work.data(), kernel.operands, parallel);
  run_tasks(a.blocks, parallel, [&](const auto& next) {
    int64_t i = next();
    if (i < 0) return;
    Scratch scratch(kernel.backward_scratch(a));
    for (; i >= 0; i = next()) kernel.backward(a, i, scratch.data());
  });
  gradients_of(c, grads).run(kernel, a.type, parallel);
}

}  // namespace
}  // namespace petal

STABLE_TORCH_LIBRARY_FRAGMENT(petal_native, m) {
  m.def(
      "expert_dispatch_fwd(Tensor?[] tensors, int[] codes, float[] numbers, Tensor(a!)[] results) "
      "-> ()");
  m.def(
      "expert_dispatch_bwd(Tensor?[] tensors, int[] codes, float[] numbers, Tensor dout, Tensor? "
      "flat_up, Tensor? dlogits, Tensor[] saved, Tensor(a!)[] grads) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(petal_native, CPU, m) {
  m.impl("expert_dispatch_fwd", TORCH_BOX(&petal::forward));
  m.impl("expert_dispatch_bwd", TORCH_BOX(&petal::backward));
}
