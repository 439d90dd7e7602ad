"""Low-rank updates whose middle combines text and vision features by a routing function.

    y_t = base_t(x) + s * route(drop(x) A_t^T; vision A_t^T) B_t^T        for every target t

A target is one of `parts` equal ranges of a linear's outputs: GPT-2's fused c_attn has three, of
which q and v (0 and 2) are routed. With `groups="separate"` (as published) each target routes in
its own r-wide space, with "merged" (the released GPT-2 code) in the space of all targets together:
the same for add and mul, another function for expand and gram.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels._runtime import checks, philox
from petal_kernels._runtime.autocast import autocast_off
from petal_kernels.nn.arguments import (
    check_choice,
    check_module,
    check_rows,
    check_size,
    check_storage,
    check_values,
)
from petal_kernels.nn.frozen_linear import (
    check_bias,
    check_input,
    compute_dtype,
    why_not_readable,
    with_bias,
)
from petal_kernels.nn.gated_adapter import ROUTES, Near, check_vision, expand_vision
from petal_kernels.ops.gated_bottleneck import gated_bottleneck

GROUPS = ("separate", "merged")


class RoutedLoRALinear(nn.Module):
    """A frozen linear and its routed low-rank update; `route="none"` is LoRA.

    base      anything called like a linear, with `in_features` and `out_features` (or Conv1D's
              `nx`, `nf`); a child unless `own_base` is False
    targets   which of `parts` equal ranges of the outputs get an update
    alpha     the update is scaled by alpha / r (default alpha = r)
    dropout   on x and, independently, on the vision features
    device    of the update; that of the base by default

    A is kaiming-uniform(a=sqrt 5), B zero: the update is zero at step 0.
    """

    base: nn.Module

    def __init__(
        self,
        base: nn.Module,
        r: int,
        route: str = "none",
        *,
        parts: int = 1,
        targets: Sequence[int] = (0,),
        groups: str = "separate",
        alpha: float | None = None,
        dropout: float = 0.0,
        variant: str = "paper",
        own_base: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_choice("route", route, ROUTES)
        check_choice("groups", groups, GROUPS)
        check_choice("variant", variant, ("paper", "release"))
        philox.check_probability(dropout)
        checks.check_bool("own_base", own_base)
        check_storage(device, dtype)
        self.in_features, self.out_features = linear_features(check_module("base", base))
        self.r, self.parts = check_size("r", r), check_size("parts", parts)
        if self.out_features % parts:
            raise ValueError(f"parts: want a divisor of {self.out_features}, got {parts}")
        if not isinstance(targets, (list, tuple)) or not all(type(t) is int for t in targets):
            got = [type(t).__name__ for t in targets] if isinstance(targets, (list, tuple)) else ""
            raise TypeError(
                f"targets: want a list of ints, got a {type(targets).__name__} {got}".rstrip()
            )
        self.targets = tuple(targets)
        ok = self.targets and list(self.targets) == sorted(set(self.targets))
        if not ok or not all(0 <= t < parts for t in self.targets):
            raise ValueError(
                f"targets: want ascending numbers of the {parts} parts, got {list(targets)}"
            )
        self.route, self.groups, self.variant = route, groups, variant
        self.scale = 1.0 if alpha is None else checks.check_number("alpha", alpha) / r
        self.dropout = float(dropout)
        if own_base:
            self.base = base
        else:
            self.__dict__["base"] = base
        device = next((p.device for p in base.parameters()), None) if device is None else device
        kind = {"device": device, "dtype": dtype}
        n, width = len(self.targets), self.out_features // parts
        self.down = nn.Parameter(torch.empty(n * r, self.in_features, **kind))  # type: ignore[arg-type]
        self.up = nn.Parameter(torch.empty(n, width, r, **kind))  # type: ignore[arg-type]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.in_features)
        self.down.uniform_(-bound, bound)
        self.up.zero_()

    def delta(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the update is where nothing is routed or dropped."""
        check_storage(None, dtype)
        delta = torch.zeros(
            self.parts, *self.up.shape[1:2], self.in_features, device=self.up.device, dtype=dtype
        )
        downs = self.down.to(dtype).view(len(self.targets), self.r, self.in_features)
        for n, target in enumerate(self.targets):
            delta[target] = self.scale * self.up[n].to(dtype) @ downs[n]
        return delta.view(self.out_features, self.in_features)

    def project(self, vision: Tensor) -> Tensor:
        """[B, V, targets * r]: vision features through the same down-projections."""
        check_values("vision", check_rows("vision", vision, self.in_features), self.down)
        return self._shrink(vision)

    def _shrink(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        x = F.dropout(x.to(dtype), self.dropout, self.training)
        with autocast_off(x):
            return F.linear(x, self.down.to(device=x.device, dtype=dtype))

    def forward(
        self, x: Tensor, vision: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """base(x) with the targets updated; `vision` from `project`, [B, L, D] x with a route;
        `bias` [out_features] in place of the base's own."""
        return self.adapted(self.base, x, vision, bias)

    def adapted(
        self,
        base: nn.Module,
        x: Tensor,
        vision: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The same on top of `base`, with `bias` [out_features] in place of its own if that is
        given. A plain frozen linear's output is nobody else's: it is updated where it lies."""
        check_module("base", base)
        self._check(x, vision)
        check_bias(bias, base, self.out_features, self.down)
        weight = base._parameters.get("weight")
        dtype = compute_dtype(x)
        plain = weight is not None and weight.dtype == dtype and not why_not_readable(base)
        if not plain or x.dtype != dtype:
            check_input(x, base)
            y: Tensor = base(x)
            return self.update(with_bias(y, base, bias), x, vision)
        assert weight is not None
        matrix = weight if isinstance(base, nn.Linear) else weight.t()
        added = base._parameters.get("bias") if bias is None else bias.to(dtype)
        rows = F.linear(x.reshape(-1, x.shape[-1]), matrix, added)
        # No view in autograd's eyes: its way to write into one copies the whole gradient thrice.
        y = torch.ops.aten._unsafe_view(rows, (*x.shape[:-1], rows.shape[-1]))
        return self.update(y, x, vision, own=True)

    def update(
        self, y: Tensor, x: Tensor, vision: Tensor | None = None, *, own: bool = False
    ) -> Tensor:
        """`y`, the base's output for x, with the targets updated; in place where y is our own."""
        self._check(x, vision)
        check_rows("y", y, self.out_features, like=x)
        checks.check_bool("own", own)
        middle = self._shrink(x)
        near = Near(y.dtype, y.device)
        middle = near(middle)
        if vision is not None:
            vision = expand_vision(near(vision), middle)
        width = self.out_features // self.parts
        pieces = [] if own else list(y.split(width, dim=-1))
        for n, target in enumerate(self.targets):
            columns = slice(n * self.r, (n + 1) * self.r)
            merged = self.groups == "merged" and len(self.targets) > 1
            # The operator's scale is the gate's, on the whole sum; this one is the update's.
            up = near.parameter(self.up[n] if self.scale == 1.0 else self.up[n] * self.scale)
            if merged:
                before, after = n * self.r, (len(self.targets) - 1 - n) * self.r
                up, columns = F.pad(up, (before, after)), slice(None)
            with autocast_off(y):
                updated = gated_bottleneck(
                    None,
                    None,
                    up,
                    base=y if own else pieces[target],
                    bottleneck=middle[..., columns],
                    activation="identity",
                    route=self.route,
                    vision=None if vision is None else vision[..., columns],
                    variant=self.variant,
                    update_at=target * width if own else None,
                )
            if own:
                y = updated
            else:
                pieces[target] = updated
        if own:
            return y
        return pieces[0] if self.parts == 1 else torch.cat(pieces, dim=-1)

    def _check(self, x: Tensor, vision: Tensor | None) -> None:
        check_values("x", check_rows("x", x, self.in_features), self.down)
        if self.route != "none" and x.dim() != 3:
            raise ValueError(f"x: want shape [B, L, {self.in_features}], got {list(x.shape)}")
        check_vision(vision, self.route, self.down.shape[0], x)

    def extra_repr(self) -> str:
        return (
            f"r={self.r}, route={self.route!r}, targets={list(self.targets)} of {self.parts}, "
            f"groups={self.groups!r}, scale={self.scale}, dropout={self.dropout}"
        )


def linear_features(base: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, transformers' Conv1D included."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = [getattr(base, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return sizes[0], sizes[1]  # type: ignore[return-value]
    raise ValueError(
        f"base: want a linear layer with in_features and out_features, got a {type(base).__name__}"
    )
