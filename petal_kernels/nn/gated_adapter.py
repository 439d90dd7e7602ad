"""Bottleneck adapters with a gate and a route: VL-PET, VL-Adapter, routing adapters.

`GatedAdapter` turns a frozen module's output h into

    norm(residual + dropout(scale G (h + act(route(h down^T + down_bias)) up^T + up_bias)))

in one operator call; what follows G is optional. Gates (`reference.py` of the operator writes each
out) read x, the frozen module's input. Two initialisations are published: "normal" (VL-PET on BART:
weights N(0, 0.02^2), biases zero; the large, middleX and small gates then start at 1/2) and "zero"
(VL-PET on T5: the down-projections keep torch's default, everything that ends in the output starts
at zero). "identity" is "zero" with the gate's bias set so that s * G = 1 at step 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels._runtime import checks, philox
from petal_kernels._runtime.autocast import autocast_off
from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.nn.arguments import (
    check_choice,
    check_module,
    check_rows,
    check_size,
    check_storage,
    check_values,
)
from petal_kernels.nn.frozen_linear import compute_dtype
from petal_kernels.nn.vision_routes import check_vision, expand_vision, joined, joins
from petal_kernels.ops.gated_bottleneck import gated_bottleneck

GATES = ("none", "large", "middleX", "middleY", "small")
ROUTES = ("none", "add", "mul", "expand", "gram", "gram_relu", "xt")
INITS = ("normal", "zero", "identity")
INIT_STD = 0.02


class GatedAdapter(nn.Module):
    """One insertion. Parameters are kept in `dtype` (float32 by default).

    features       width of h (and of x, except for the large gate: gate_features)
    r, gate_r      ranks of the adapter and of the large gate (default r)
    gate           "none", "large", "middleX", "middleY" or "small"
    route          "none", "add", "mul", "expand", "gram", "gram_relu" or "xt": all but the first
                   need vision features, "xt" as many tokens of them as h has
    add_input      False: the adapter's output replaces h in the sum
    variant        "paper", or "release" for the authors' checkpoints: add and mul then join token
                   by token where there are several vision tokens, and want as many as h has
    """

    down: nn.Parameter
    up: nn.Parameter

    def __init__(
        self,
        features: int,
        r: int,
        *,
        gate: str = "none",
        gate_r: int | None = None,
        gate_features: int | None = None,
        activation: str = "gelu_tanh",
        route: str = "none",
        scale: float = 1.0,
        add_input: bool = True,
        init: str = "normal",
        variant: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.features, self.r = check_size("features", features), check_size("r", r)
        self.gate_r = check_size("gate_r", r if gate_r is None else gate_r)
        width = features if gate_features is None else gate_features
        self.gate_features = check_size("gate_features", width)
        for name, value, choices in (
            ("gate", gate, GATES),
            ("route", route, ROUTES),
            ("activation", activation, ACTIVATIONS),
            ("init", init, INITS),
            ("variant", variant, ("paper", "release")),
        ):
            check_choice(name, value, choices)
        check_storage(device, dtype)
        self.gate, self.route, self.activation = gate, route, activation
        self.scale = checks.check_number("scale", scale)
        self.add_input = checks.check_bool("add_input", add_input)
        self.init, self.variant = init, variant
        if init == "identity" and gate != "none":
            self._open_bias()  # raises where there is none

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self._make("down", parameter, r, features)
        self.down_bias = parameter(r)
        self._make("up", parameter, features, r)
        self.up_bias = parameter(features)
        names = ("gate_down", "gate_down_bias", "gate_up", "gate_up_bias")
        for name in (*names, "gate_weight", "gate_bias"):
            self.register_parameter(name, None)
        if gate == "large":
            self.gate_down = parameter(self.gate_r, self.gate_features)
            self.gate_down_bias = parameter(self.gate_r)
            self.gate_up = parameter(features, self.gate_r)
            self.gate_up_bias = parameter(features)
        elif gate != "none":
            self.gate_weight = parameter(2 * features if gate == "small" else features)
            if gate != "middleY":
                self.gate_bias = parameter(1)
        self.reset_parameters()

    def _make(
        self, name: str, parameter: Callable[..., nn.Parameter], rows: int, columns: int
    ) -> None:
        """What one of `projections` is, or is formed from."""
        self.register_parameter(name, parameter(rows, columns))

    def projections(self) -> tuple[Tensor, Tensor]:
        """The down-projection [r, features] and the up-projection [features, r]."""
        return self.down, self.up

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            parameter.zero_()
        self._reset_projections()
        if self.init == "normal":
            for weight in (self.gate_down, self.gate_up, self.gate_weight):
                if weight is not None:
                    weight.normal_(0.0, INIT_STD)
            return
        if self.gate_down is not None:
            spread(self.gate_down, self.gate_down_bias)
        if self.init == "identity" and self.gate != "none":
            self._open_gate()

    def _reset_projections(self) -> None:
        if self.init == "normal":
            self.down.normal_(0.0, INIT_STD)
            self.up.normal_(0.0, INIT_STD)
        else:
            spread(self.down, self.down_bias)

    def _open_gate(self) -> None:
        """Sets the gate's bias so that scale * G is one."""
        bias = {"large": self.gate_up_bias, "middleY": self.gate_weight}.get(
            self.gate, self.gate_bias
        )
        assert bias is not None
        bias.fill_(self._open_bias())

    def _open_bias(self) -> float:
        want = 1.0 / self.scale if self.scale else math.inf
        if self.gate == "middleY":
            want -= 1.0
            if self.variant == "release":  # the gate is 1 + w itself
                return want
        if not 0.0 < want < 1.0:
            raise ValueError(
                f"init: 'identity' cannot be reached by gate {self.gate!r} with scale "
                f"{self.scale}: want a sigmoid between 0 and 1 for scale * G = 1, got {want:g}"
            )
        bias: float = math.log(want / (1.0 - want))
        return bias

    def project(self, vision: Tensor) -> Tensor:
        """[B, V, r]: vision features through the same down-projection, for `forward(vision=)`.

        Computed here it can be shared by all steps of a decoding loop.
        """
        check_values("vision", check_rows("vision", vision, self.features), self.down_bias)
        dtype = compute_dtype(vision)
        with autocast_off(vision):
            down, _ = self.projections()
            return F.linear(vision.to(dtype), down.to(dtype), self.down_bias.to(dtype))

    def forward(
        self,
        h: Tensor,
        x: Tensor | None = None,
        *,
        vision: Tensor | None = None,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        residual: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
        training: bool | None = None,
    ) -> Tensor:
        """The adapted h, [..., features].

        h         [..., features], the frozen module's output ([B, L, features] where a route or
                  the small gate needs samples).
        x         [..., features], its input: what large, middleX and small read.
        vision    [B, V, r] from `project`, with a route. Where h's batch is a multiple of B, as in
                  beam search, every sample serves that many neighbouring rows.
        mask      [B, L], nonzero where a token counts (small).
        dropout   on the gated sum, while `training` (default: the module's own flag).
        residual  added after dropout; give the very x where it is x, so that it is read once.
        norm      a LayerNorm over the result.
        """
        self._check(h, x, vision, mask, dropout, residual, norm, training)
        near = Near(compute_dtype(h), h.device)
        if vision is not None:
            vision = expand_vision(near(vision), h)
        same = residual is not None and residual is x
        x = None if x is None or not (same or self._reads_x) else near(x)
        with autocast_off(h):
            return gated_bottleneck(
                **self._bottleneck(near(h), vision, near),
                up_bias=near.parameter(self.up_bias),
                activation=self.activation,
                gate=self.gate,
                gate_input=x,
                gate_down=near.optional(self.gate_down),
                gate_down_bias=near.optional(self.gate_down_bias),
                gate_up=near.optional(self.gate_up),
                gate_up_bias=near.optional(self.gate_up_bias),
                gate_weight=near.optional(self.gate_weight),
                gate_bias=near.optional(self.gate_bias),
                mask=mask,
                scale=self.scale,
                dropout=dropout,
                residual="gate_input" if same else near(residual) if residual is not None else None,
                norm_weight=None if norm is None else near.parameter(norm.weight),
                norm_bias=None if norm is None else near.parameter(norm.bias),
                norm_eps=1e-5 if norm is None else norm.eps,
                variant=self.variant,
                training=self.training if training is None else training,
            )

    def _bottleneck(self, h: Tensor, vision: Tensor | None, near: Near) -> dict[str, Any]:
        """What the operator makes z and q of, or q where it is formed here; and what z is added
        to."""
        down, up = self.projections()
        given: dict[str, Any] = {"up": near.parameter(up)}
        if vision is not None and joins(self.route, self.variant, vision):
            z = F.linear(h, near(down), near(self.down_bias))
            q = joined(self.route, z, vision)
            base = h if self.add_input else None
            return given | {"x": None, "down": None, "bottleneck": q, "base": base}
        return given | {
            "x": h,
            "down": near.parameter(down),
            "down_bias": near.parameter(self.down_bias),
            "base": "input" if self.add_input else None,
            "route": self.route,
            "vision": vision,
        }

    def _check(
        self,
        h: Tensor,
        x: Tensor | None,
        vision: Tensor | None,
        mask: Tensor | None,
        dropout: float,
        residual: Tensor | None,
        norm: nn.LayerNorm | None,
        training: bool | None,
    ) -> None:
        check_rows("h", h, self.features)
        if h.dim() != 3 and (self.gate == "small" or self.route != "none"):
            raise ValueError(f"h: want shape [B, L, {self.features}], got {list(h.shape)}")
        if x is not None and self._reads_x:
            width = self.gate_features if self.gate == "large" else self.features
            check_rows("x", x, width, like=h)
        elif x is not None:
            checks.check_tensor("x", x)
        elif self._reads_x:
            raise TypeError(f"x: want a Tensor with gate={self.gate!r}, got None")
        check_vision(vision, self.route, self.r, h, self.variant)
        if mask is not None:
            checks.check_mask("mask", mask, tuple(h.shape[:-1]))
        philox.check_probability(dropout)
        if residual is not None:
            check_rows("residual", residual, self.features, like=h)
        if norm is not None:
            check_module("norm", norm)
            for name in ("weight", "bias"):
                part = getattr(norm, name, None)
                if part is None or part.shape != (self.features,):
                    got = "none" if part is None else list(part.shape)
                    raise ValueError(f"norm: want a {name} [{self.features}], got {got}")
        if training is not None:
            checks.check_bool("training", training)

    @property
    def _reads_x(self) -> bool:
        return self.gate in ("large", "middleX", "small")

    def extra_repr(self) -> str:
        parts = [f"features={self.features}, r={self.r}, activation={self.activation!r}"]
        parts += [f"gate={self.gate!r}"] if self.gate != "none" else []
        parts += [f"gate_r={self.gate_r}"] if self.gate == "large" else []
        parts += [f"route={self.route!r}"] if self.route != "none" else []
        parts += [f"scale={self.scale}"] if self.scale != 1.0 else []
        parts += [] if self.add_input else ["add_input=False"]
        return ", ".join(parts)


class VLAdapter(GatedAdapter):
    """VL-Adapter's bottleneck: h + W_up gelu_new(W_down h), rank features / 8 by default."""

    def __init__(
        self,
        features: int,
        r: int | None = None,
        *,
        activation: str = "gelu_tanh",
        init: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        rank = max(check_size("features", features) // 8, 1) if r is None else r
        super().__init__(
            features, rank, activation=activation, init=init, device=device, dtype=dtype
        )


class RoutedAdapter(GatedAdapter):
    """A bottleneck adapter whose middle combines text and vision features by a routing function.

    `forward(h, vision=self.project(features))`.
    """

    def __init__(
        self,
        features: int,
        r: int,
        route: str,
        *,
        activation: str = "gelu_tanh",
        add_input: bool = True,
        variant: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            features,
            r,
            activation=activation,
            route=route,
            add_input=add_input,
            variant=variant,
            device=device,
            dtype=dtype,
        )


def spread(weight: Tensor, bias: Tensor) -> None:
    """Draws both as torch's own Linear does."""
    bound = 1.0 / math.sqrt(weight.shape[1])
    weight.uniform_(-bound, bound)
    bias.uniform_(-bound, bound)


class Near:
    """Tensors in the compute dtype and on the device of one call."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def __call__(self, t: Tensor) -> Tensor:
        return t.to(device=self.device, dtype=self.dtype)

    def optional(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else self.parameter(t)

    def parameter(self, t: Tensor) -> Tensor:
        """float32 stays float32 beside 16-bit rows: the operator rounds nothing."""
        keep = t.dtype == torch.float32 and self.dtype != torch.float64
        return t.to(device=self.device, dtype=t.dtype if keep else self.dtype)
