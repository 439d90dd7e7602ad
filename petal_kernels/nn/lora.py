"""LoRA on one frozen linear: y = base(x) + s * drop(x) A^T B^T, in one operator call.

Where the base is a plain frozen linear its weight goes into the call, else its output does. Kept
for backward are x itself (the very tensor where it has the compute dtype), x A^T [N, r] and the
generator's state: of several linears that read one x it is kept once.

A and B that are taken out of the base's weight (`lora_init.py`) leave it as it is: with their first
values A0, B0 the update is s * (drop(x) A^T B^T - x A0^T B0^T). Without dropout that is the same
one call of rank 2 r, half of it frozen ([A; A0] and [B, -B0] are kept beside x and the middle, now
[N, 2 r]); with dropout, which the frozen half has none of, it is a call of its own before it.

Source: Hu et al., "LoRA", 2021; rank-stabilised scale: Kalajdzievski, 2023. The initialisations are
PEFT's, by the names that it gives them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks, philox
from petal_kernels._runtime.autocast import autocast_off, autocast_on
from petal_kernels.nn.arguments import (
    check_module,
    check_rows,
    check_size,
    check_storage,
    check_values,
)
from petal_kernels.nn.base_weight import base_weight
from petal_kernels.nn.frozen_linear import (
    check_bias,
    check_input,
    compute_dtype,
    near,
    why_not_readable,
    with_bias,
)
from petal_kernels.nn.lora_init import check_init, is_taken, taken
from petal_kernels.nn.routed_lora import linear_features
from petal_kernels.ops.lowrank_linear import lowrank_linear


class Operands(NamedTuple):
    """What one call of `lowrank_linear`, or of an operator that joins several, reads besides x."""

    weight: Tensor  # W [out, in], any strides
    bias: Tensor | None  # [out]
    down: Tensor | None = None  # A [r, in]; none, nor B, where the linear has no update
    up: Tensor | None = None  # B [out, r]
    scale: float = 1.0
    dropout: float = 0.0  # 0 in evaluation
    gain: Tensor | None = None  # [out], of base and update together, before the bias


class LoRALinear(nn.Module):
    """A frozen linear and its low-rank update.

    base      anything called like a linear, with `in_features` and `out_features` (or Conv1D's
              `nx`, `nf`); a child unless `own_base` is False
    alpha     the update is scaled by alpha / r (default alpha = r), with `rslora` by alpha / sqrt r
    dropout   on x, for the update only
    init      True: A is kaiming-uniform(a=sqrt 5), B zero; "gaussian": A is normal with the
              deviation 1 / r, B zero; False: both as linears are drawn, so that the update is not
              zero at step 0; "pissa", "pissa_niter_N" (N steps of a randomised decomposition) and
              "olora": taken out of the base's weight; their first values are buffers
    device    of the update; that of the base by default
    """

    base: nn.Module

    def __init__(
        self,
        base: nn.Module,
        r: int = 8,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
        init: bool | str = True,
        own_base: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        philox.check_probability(dropout)
        checks.check_bool("rslora", rslora)
        checks.check_bool("own_base", own_base)
        check_storage(device, dtype)
        check_init("init", init)
        self.in_features, self.out_features = linear_features(check_module("base", base))
        self.r, self.dropout = check_size("r", r), float(dropout)
        alpha = float(r) if alpha is None else checks.check_number("alpha", alpha)
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        if own_base:
            self.base = base
        else:
            self.__dict__["base"] = base
        device = next((p.device for p in base.parameters()), None) if device is None else device
        self.down = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(self.out_features, r, device=device, dtype=dtype))
        self.first_down: Tensor | None  # A0 [r, in], B0 [out, r]; None where nothing was taken
        self.first_up: Tensor | None
        self.register_buffer("first_down", None)
        self.register_buffer("first_up", None)
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: bool | str = True) -> None:
        """Draws A and B anew, or takes them out of the base's weight."""
        check_init("init", init)
        if is_taken(init):
            self._take(str(init))
            return
        self.first_down = self.first_up = None
        if init == "gaussian":
            self.down.normal_(std=1.0 / self.r)
        else:
            bound = 1.0 / math.sqrt(self.in_features)  # kaiming with a = sqrt 5
            self.down.uniform_(-bound, bound)
        if init is False:
            bound = 1.0 / math.sqrt(self.r)
            self.up.uniform_(-bound, bound)
        else:
            self.up.zero_()

    def _take(self, init: str) -> None:
        weight = base_weight(self.base)
        if isinstance(weight, str):
            raise ValueError(f"init: want a base whose weight {init!r} can decompose: {weight}")
        down, up = taken(weight, self.r, init, self.scale)
        self.down.copy_(down)
        self.up.copy_(up)
        self.first_down, self.first_up = self.down.detach().clone(), self.up.detach().clone()

    def reserve_first(self) -> None:
        """Room for the first values that a file brings: nothing is decomposed for it."""
        self.first_down = torch.zeros_like(self.down, requires_grad=False)
        self.first_up = torch.zeros_like(self.up, requires_grad=False)

    def _factors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """A and B as a call in `dtype` reads them, or [A; A0] and [B, -B0]."""
        down, up = near(self.down, dtype, device), near(self.up, dtype, device)
        first_down, first_up = self._buffers["first_down"], self._buffers["first_up"]
        if first_down is None or first_up is None:
            return down, up
        first = (near(p, dtype, device) for p in (first_down, first_up))
        return torch.cat((down, next(first))), torch.cat((up, -next(first)), dim=1)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the update is where nothing is dropped."""
        check_storage(None, dtype)
        down, up = self._factors(dtype, self.down.device)
        delta: Tensor = self.scale * (up.to(dtype) @ down.to(dtype))
        return delta

    def operands(
        self, dtype: torch.dtype, device: torch.device, bias: Tensor | None = None
    ) -> Operands | str:
        """What a call in `dtype` reads, or why the base must be called instead; `bias` [out] in
        place of the base's own."""
        check_storage(device, dtype)
        if bias is not None:
            check_bias(bias, self.base, self.out_features, self.down)
        found = frozen_operands(self.base, dtype, device, bias)
        if isinstance(found, str):
            return found
        dropout = self.dropout if self.training else 0.0
        if dropout and self.first_down is not None:
            return "dropout leaves out what was taken from the base"
        factors = self._factors(dtype, device)
        return Operands(found.weight, found.bias, *factors, self.scale, dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """base(x) with the update; `bias` [out] in place of the base's own."""
        check_values("x", check_rows("x", x, self.in_features), self.down)
        dtype = compute_dtype(x)
        found = self.operands(dtype, x.device, bias)
        rows = x if x.dtype == dtype else x.to(dtype)
        if isinstance(found, Operands):
            return _fused(rows, found)
        down, up = self._factors(dtype, x.device)
        if self.dropout and self.training and self.first_down is not None:
            down, up = (near(p, dtype, x.device) for p in (self.down, self.up))
            y = self._without_first(x, rows, bias)
        else:
            y = self._called(x, bias)
        return self._added(y, rows, down, up)

    def _called(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The base's own output: it gets x as the model hands it over."""
        check_input(x, self.base)
        return with_bias(self.base(x), self.base, bias)

    def _without_first(self, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """What is left of the base's output where A0 and B0 are taken out of its weight."""
        assert self.first_down is not None
        assert self.first_up is not None
        down, up = (near(p, rows.dtype, rows.device) for p in (self.first_down, self.first_up))
        more: dict[str, Any] = {"scale": -self.scale, "dropout": 0.0}
        found = frozen_operands(self.base, rows.dtype, rows.device, bias)
        if isinstance(found, Operands):
            more |= {"weights": [found.weight], "biases": [found.bias]}
            return self._update(rows, down, up, **more)
        return self._added(self._called(x, bias), rows, down, up, **more)

    def _added(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor, **more: Any) -> Tensor:
        """`y`, which somebody else computed, with the update."""
        if y.dtype == x.dtype and y.shape[:-1] == x.shape[:-1]:
            return self._update(x, down, up, base=[y], **more)
        return y + self._update(x, down, up, **more).to(y.dtype)

    def _update(self, x: Tensor, down: Tensor, up: Tensor, **more: Any) -> Tensor:
        """The one call; the dtypes are settled, so autocast casts nothing inside."""
        settings = {"scale": self.scale, "dropout": self.dropout, "training": self.training}
        with autocast_off(x):
            return lowrank_linear(x, down, [up], dropout_at="input", **(settings | more))[0]

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale}, dropout={self.dropout}"


def _fused(x: Tensor, o: Operands) -> Tensor:
    """The one call with the base's weight in it, in the dtypes that are settled."""
    assert o.down is not None
    assert o.up is not None
    if autocast_on(x.device.type):
        with autocast_off(x):
            return _fused(x, o)
    (y,) = lowrank_linear(
        *(x, o.down, (o.up,)),
        weights=(o.weight,),
        biases=(o.bias,),
        scale=o.scale,
        dropout=o.dropout,
        dropout_at="input",
    )
    return y


def frozen_operands(
    base: nn.Module, dtype: torch.dtype, device: torch.device, bias: Tensor | None = None
) -> Operands | str:
    """The frozen linear's part of a call in `dtype`, or why the linear must be called itself."""
    why = why_not_readable(base)
    if why:
        return why
    weight, own = base._parameters["weight"], base._parameters.get("bias")
    assert weight is not None
    for part in (weight, own if bias is None else None):
        if part is None:
            continue
        if part.requires_grad and torch.is_grad_enabled():
            return "base is trained"
        if part.dtype != dtype:
            want = checks.dtype_name(dtype)
            return f"base is {checks.dtype_name(part.dtype)}, computed in {want}"
    matrix = weight if isinstance(base, nn.Linear) else weight.t()  # transformers' Conv1D
    return Operands(matrix, own if bias is None else bias.to(device=device, dtype=dtype))
