// A call of gated_bottleneck as Python hands it over to both libraries.
#pragma once

#include "common/torch_boundary.h"

namespace petal {

// The fields of arguments.Tensors.
struct Input {
  enum Name {
    kX,
    kDown,
    kDownBias,
    kBottleneck,
    kUp,
    kUpBias,
    kBase,
    kLeft,
    kRight,
    kGateInput,
    kGateDown,
    kGateDownBias,
    kGateUp,
    kGateUpBias,
    kGateWeight,
    kGateBias,
    kTokenWeights,
    kResidual,
    kNormWeight,
    kNormBias,
    kCount
  };
};

struct GatedSettings {
  Activation activation;
  Route route;
  bool route_relu;
  Gate gate;
  bool gate_linear;
  bool row_gate;     // one number per row: middleX, small
  bool sees_output;  // of a row gate: its logit reads Y in place of H
  bool add_input, add_gate_input;
  int64_t samples;
  float scale, eps;
  double dropout;
};

// From the two lists of settings.codes.
inline GatedSettings gated_settings(const std::vector<int64_t>& codes,
                                    const std::vector<double>& numbers) {
  STD_TORCH_CHECK(codes.size() == 9 && numbers.size() == 3,
                  "gated_bottleneck: a list of another length");
  GatedSettings s = {};
  s.activation = static_cast<Activation>(codes[0]);
  s.route = static_cast<Route>(codes[1]);
  s.route_relu = codes[2] != 0;
  s.gate = static_cast<Gate>(codes[3]);
  s.gate_linear = codes[4] != 0;
  s.row_gate = s.gate == Gate::kMiddleX || s.gate == Gate::kSmall;
  s.sees_output = s.row_gate && codes[5] != 0;
  s.add_input = codes[6] != 0;
  s.add_gate_input = codes[7] != 0;
  s.samples = codes[8];
  s.scale = static_cast<float>(numbers[0]);
  s.dropout = numbers[1];
  s.eps = static_cast<float>(numbers[2]);
  return s;
}

}  // namespace petal
