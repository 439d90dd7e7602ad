"""Low-rank updates whose middle combines text and vision features by a routing function.

    y_t = base_t(x) + s * route(drop(x) A_t^T; vision A_t^T) B_t^T        for every target t

A target is one of `parts` ranges of a linear's outputs: GPT-2's fused c_attn has three equal ones,
of which q and v (0 and 2) are routed, Phi-3's qkv_proj a wide one and two that are as narrow as its
groups of heads say. With `groups="separate"` (as published) each target routes in
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
from petal_kernels.nn.gated_adapter import ROUTES, Near
from petal_kernels.nn.vision_routes import check_vision, expand_vision, joined, joins
from petal_kernels.ops.gated_bottleneck import gated_bottleneck

GROUPS = ("separate", "merged")


class RoutedLoRALinear(nn.Module):
    """A frozen linear and its routed low-rank update; `route="none"` is LoRA.

    base      anything called like a linear, with `in_features` and `out_features` (or Conv1D's
              `nx`, `nf`); a child unless `own_base` is False
    targets   which of `parts` ranges of the outputs get an update; `parts` is how many equal ones,
              or the width of each
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
        parts: int | Sequence[int] = 1,
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
        self.r = check_size("r", r)
        self.widths = _widths(parts, self.out_features)
        self.parts = len(self.widths)
        if not isinstance(targets, (list, tuple)) or not all(type(t) is int for t in targets):
            got = [type(t).__name__ for t in targets] if isinstance(targets, (list, tuple)) else ""
            raise TypeError(
                f"targets: want a list of ints, got a {type(targets).__name__} {got}".rstrip()
            )
        self.targets = tuple(targets)
        ok = self.targets and list(self.targets) == sorted(set(self.targets))
        if not ok or not all(0 <= t < self.parts for t in self.targets):
            raise ValueError(
                f"targets: want ascending numbers of the {self.parts} parts, got {list(targets)}"
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
        widths = [self.widths[target] for target in self.targets]
        # One after the other where they differ; else as they always were, so that files fit.
        same = (len(widths), widths[0]) if len(set(widths)) == 1 else (sum(widths),)
        self.down = nn.Parameter(torch.empty(len(widths) * r, self.in_features, **kind))  # type: ignore[arg-type]
        self.up = nn.Parameter(torch.empty(*same, r, **kind))  # type: ignore[arg-type]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.in_features)
        self.down.uniform_(-bound, bound)
        self.up.zero_()

    def delta(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the update is where nothing is routed or dropped."""
        check_storage(None, dtype)
        like = self.down.to(dtype)
        rows = [like.new_zeros(width, self.in_features) for width in self.widths]
        downs = like.view(len(self.targets), self.r, self.in_features)
        for target, up, down in zip(self.targets, self.ups(), downs, strict=True):
            rows[target] = self.scale * up.to(dtype) @ down
        return torch.cat(rows)

    def ups(self) -> list[Tensor]:
        """B of every target, [its width, r]."""
        if self.up.dim() == 3:
            return list(self.up.unbind())
        return list(self.up.split([self.widths[target] for target in self.targets]))

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
        pieces = [] if own else list(y.split(self.widths, dim=-1))
        for n, (target, up) in enumerate(zip(self.targets, self.ups(), strict=True)):
            columns = slice(n * self.r, (n + 1) * self.r)
            merged = self.groups == "merged" and len(self.targets) > 1
            # The operator's scale is the gate's, on the whole sum; this one is the update's.
            up = near.parameter(up if self.scale == 1.0 else up * self.scale)
            if merged:
                before, after = n * self.r, (len(self.targets) - 1 - n) * self.r
                up, columns = F.pad(up, (before, after)), slice(None)
            z, v = middle[..., columns], None if vision is None else vision[..., columns]
            route = self.route
            with autocast_off(y):
                if v is not None and joins(route, self.variant, v):
                    z, v, route = joined(route, z, v), None, "none"
                updated = gated_bottleneck(
                    None,
                    None,
                    up,
                    base=y if own else pieces[target],
                    bottleneck=z,
                    activation="identity",
                    route=route,
                    vision=v,
                    variant=self.variant,
                    update_at=sum(self.widths[:target]) if own else None,
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
        check_vision(vision, self.route, self.down.shape[0], x, self.variant)

    def extra_repr(self) -> str:
        return (
            f"r={self.r}, route={self.route!r}, targets={list(self.targets)} of {self.parts}, "
            f"groups={self.groups!r}, scale={self.scale}, dropout={self.dropout}"
        )


def _widths(parts: int | Sequence[int], total: int) -> tuple[int, ...]:
    """The widths of so many equal parts, or those that are given."""
    if isinstance(parts, (list, tuple)):
        widths = tuple(check_size("parts", each) for each in parts)
        if sum(widths) != total:
            raise ValueError(f"parts: want widths that are {total} in all, got {list(parts)}")
        return widths
    count = check_size("parts", parts)
    if total % count:
        raise ValueError(f"parts: want a divisor of {total}, got {count}")
    return (total // count,) * count


def linear_features(base: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, transformers' Conv1D included."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = [getattr(base, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return sizes[0], sizes[1]  # type: ignore[return-value]
    raise ValueError(
        f"base: want a linear layer with in_features and out_features, got a {type(base).__name__}"
    )
