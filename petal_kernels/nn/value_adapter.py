"""VL-PET's value adapters: one bottleneck per decoder layer, all reading the encoder's output.

    V_l' = V_l + act(E D_l^T + c_l) U_l^T + b_l,   V_l = W_v E + b_v in layer l's cross-attention

E is the same tensor for every layer, so the down-projections of all layers are one matrix: E is
read once, and kept once for backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels._runtime.autocast import autocast_off
from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.nn.arguments import (
    check_choice,
    check_index,
    check_rows,
    check_size,
    check_storage,
    check_values,
)
from petal_kernels.nn.frozen_linear import compute_dtype
from petal_kernels.nn.gated_adapter import INIT_STD, INITS, Near
from petal_kernels.ops.gated_bottleneck import gated_bottleneck


class ValueAdapter(nn.Module):
    """The adapters of `layers` layers; `init` as GatedAdapter's ("normal" or "zero")."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        layers: int = 1,
        *,
        activation: str = "gelu_tanh",
        init: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_features", in_features),
            ("out_features", out_features),
            ("r", r),
            ("layers", layers),
        ):
            setattr(self, name, check_size(name, value))
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("init", init, INITS[:2])
        check_storage(device, dtype)
        self.in_features: int
        self.out_features: int
        self.r: int
        self.layers: int
        self.activation, self.init = activation, init
        kind = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(layers * r, in_features, **kind))  # type: ignore[arg-type]
        self.down_bias = nn.Parameter(torch.empty(layers * r, **kind))  # type: ignore[arg-type]
        self.up = nn.Parameter(torch.empty(layers, out_features, r, **kind))  # type: ignore[arg-type]
        self.up_bias = nn.Parameter(torch.empty(layers, out_features, **kind))  # type: ignore[arg-type]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            parameter.zero_()
        if self.init == "normal":
            self.down.normal_(0.0, INIT_STD)
            self.up.normal_(0.0, INIT_STD)
            return
        bound = self.in_features**-0.5
        self.down.uniform_(-bound, bound)
        self.down_bias.uniform_(-bound, bound)

    def project(self, encoded: Tensor, layer: int | None = None) -> tuple[Tensor, ...]:
        """[..., r] for every layer (or `layer` alone) from the encoder's output: one product."""
        check_values("encoded", check_rows("encoded", encoded, self.in_features), self.down)
        if layer is not None:
            check_index("layer", layer, self.layers)
        near = Near(compute_dtype(encoded), self.down.device)
        down, bias = near(self.down), near(self.down_bias)
        if layer is not None:
            rows = slice(layer * self.r, (layer + 1) * self.r)
            down, bias = down[rows], bias[rows]
        with autocast_off(encoded):
            middle = F.linear(near(encoded), down, bias)
        return tuple(middle.split(self.r, dim=-1))

    def forward(self, values: Tensor, middle: Tensor, layer: int = 0) -> Tensor:
        """V_l' from V_l [..., out_features] and layer l's part of `project`."""
        check_rows("values", values, self.out_features)
        check_rows("middle", middle, self.r, like=values)
        check_index("layer", layer, self.layers)
        dtype = compute_dtype(values)
        near = Near(dtype, values.device)
        with autocast_off(values):
            return gated_bottleneck(
                None,
                None,
                near.parameter(self.up[layer]),
                None,
                near.parameter(self.up_bias[layer]),
                base=near(values),
                bottleneck=near(middle),
                activation=self.activation,
            )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"layers={self.layers}, activation={self.activation!r}"
        )
