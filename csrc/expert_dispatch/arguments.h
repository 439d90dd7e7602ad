// A call of expert_dispatch as Python hands it over to both libraries.
#pragma once

#include "common/torch_boundary.h"

namespace petal {

// The fields of arguments.Tensors.
struct Input {
  enum Name {
    kX,
    kDown,
    kDownBias,
    kUp,
    kUpBias,
    kBase,
    kRouter,
    kRouterBias,
    kNoise,
    kGates,
    kChosen,
    kCount
  };
};

struct ExpertSettings {
  Activation activation;
  ExpertGate gate;
  int64_t experts, rank, top_k;
  bool renormalize;
  int64_t tokens_per_gate;
  bool add_input;
  bool shared_down;  // one down-projection for all experts
  bool sorted;       // rows by expert
  float keep, mix;
};

// From the two lists of settings.codes.
inline ExpertSettings expert_settings(const std::vector<int64_t>& codes,
                                      const std::vector<double>& numbers) {
  STD_TORCH_CHECK(codes.size() == 10 && numbers.size() == 2,
                  "expert_dispatch: a list of another length");
  ExpertSettings s = {};
  s.activation = static_cast<Activation>(codes[0]);
  s.gate = static_cast<ExpertGate>(codes[1]);
  s.experts = codes[2];
  s.rank = codes[3];
  s.top_k = codes[4];
  s.renormalize = codes[5] != 0;
  s.tokens_per_gate = codes[6];
  s.add_input = codes[7] != 0;
  s.shared_down = codes[8] != 0;
  s.sorted = codes[9] != 0;
  s.keep = static_cast<float>(numbers[0]);
  s.mix = static_cast<float>(numbers[1]);
  return s;
}

}  // namespace petal
