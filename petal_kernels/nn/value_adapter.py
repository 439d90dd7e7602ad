"""VL-PET's value adapters: one bottleneck per decoder layer, all reading the encoder's output.

    V_l' = V_l + s (act(E D_l^T + c_l) U_l^T + b_l),   V_l = W_v E + b_v in layer l's attention

E is the same tensor for every layer, so the down-projections of all layers are one matrix: E is
read once, and kept once for backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels._runtime import checks
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
from petal_kernels.nn.gated_adapter import INIT_STD, INITS, Near, spread
from petal_kernels.ops.gated_bottleneck import gated_bottleneck


class ValueAdapter(nn.Module):
    """The adapters of `layers` layers; `init` as GatedAdapter's ("normal" or "zero"), `scale` what
    every update is multiplied by."""

    down: nn.Parameter
    up: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        layers: int = 1,
        *,
        activation: str = "gelu_tanh",
        scale: float = 1.0,
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
        self.scale = checks.check_number("scale", scale)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self._make("down", parameter, layers * r, in_features)
        self.down_bias = parameter(layers * r)
        self._make("up", parameter, layers, out_features, r)
        self.up_bias = parameter(layers, out_features)
        self.reset_parameters()

    def _make(self, name: str, parameter: Callable[..., nn.Parameter], *shape: int) -> None:
        """What `downs` or `up_of` gives, or is formed from."""
        self.register_parameter(name, parameter(*shape))

    def _downs(self, layer: int | None = None) -> Tensor:
        """The down-projections of all layers, [layers r, in_features], or one, [r, in_features]."""
        return self.down if layer is None else self.down[layer * self.r : (layer + 1) * self.r]

    def _up_of(self, layer: int) -> Tensor:
        """One layer's up-projection [out_features, r]."""
        return self.up[layer]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            parameter.zero_()
        self._reset_projections()

    def _reset_projections(self) -> None:
        if self.init == "normal":
            self.down.normal_(0.0, INIT_STD)
            self.up.normal_(0.0, INIT_STD)
        else:
            spread(self.down, self.down_bias)

    def project(self, encoded: Tensor, layer: int | None = None) -> tuple[Tensor, ...]:
        """[..., r] for every layer (or `layer` alone) from the encoder's output: one product."""
        check_values("encoded", check_rows("encoded", encoded, self.in_features), self.down_bias)
        if layer is not None:
            check_index("layer", layer, self.layers)
        near = Near(compute_dtype(encoded), self.down_bias.device)
        rows = slice(None) if layer is None else slice(layer * self.r, (layer + 1) * self.r)
        with autocast_off(encoded):
            middle = F.linear(near(encoded), near(self._downs(layer)), near(self.down_bias[rows]))
        return tuple(middle.split(self.r, dim=-1))

    def forward(self, values: Tensor, middle: Tensor, layer: int = 0) -> Tensor:
        """V_l' from V_l [..., out_features] and layer l's part of `project`."""
        check_rows("values", values, self.out_features)
        check_rows("middle", middle, self.r, like=values)
        check_index("layer", layer, self.layers)
        dtype = compute_dtype(values)
        near = Near(dtype, values.device)
        with autocast_off(values):
            up, bias = self._up_of(layer), self.up_bias[layer]
            if self.scale != 1.0:  # the operator's own is on the sum with the values
                up, bias = self.scale * up, self.scale * bias
            return gated_bottleneck(
                None,
                None,
                near.parameter(up),
                None,
                near.parameter(bias),
                base=near(values),
                bottleneck=near(middle),
                activation=self.activation,
            )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"layers={self.layers}, activation={self.activation!r}"
        ) + (f", scale={self.scale}" if self.scale != 1.0 else "")
