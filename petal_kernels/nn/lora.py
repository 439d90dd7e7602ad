"""LoRA on one frozen linear: y = base(x) + s * drop(x) A^T B^T, in one operator call.

Where the base is a plain frozen linear its weight goes into the call, else its output does. Kept
for backward are x itself (the very tensor where it has the compute dtype), x A^T [N, r] and the
generator's state: of several linears that read one x it is kept once.

Source: Hu et al., "LoRA", 2021; rank-stabilised scale: Kalajdzievski, 2023. The initialisations are
PEFT's, by the names that it gives them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks, philox
from petal_kernels._runtime.autocast import autocast_off
from petal_kernels.nn.arguments import (
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
    near,
    why_not_readable,
    with_bias,
)
from petal_kernels.nn.routed_lora import linear_features
from petal_kernels.ops.lowrank_linear import lowrank_linear

INITS = (True, False, "gaussian")


class Operands(NamedTuple):
    """What one call of `lowrank_linear`, or of an operator that joins several, reads besides x."""

    weight: Tensor  # W [out, in], any strides
    bias: Tensor | None  # [out]
    down: Tensor | None = None  # A [r, in]; none, nor B, where the linear has no update
    up: Tensor | None = None  # B [out, r]
    scale: float = 1.0
    dropout: float = 0.0  # 0 in evaluation


class LoRALinear(nn.Module):
    """A frozen linear and its low-rank update.

    base      anything called like a linear, with `in_features` and `out_features` (or Conv1D's
              `nx`, `nf`); a child unless `own_base` is False
    alpha     the update is scaled by alpha / r (default alpha = r), with `rslora` by alpha / sqrt r
    dropout   on x, for the update only
    init      True: A is kaiming-uniform(a=sqrt 5), B zero; "gaussian": A is normal with the
              deviation 1 / r, B zero; False: both as linears are drawn, so that the update is not
              zero at step 0
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
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: bool | str = True) -> None:
        """Draws A and B anew."""
        check_init("init", init)
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

    def delta(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the update is where nothing is dropped."""
        check_storage(None, dtype)
        delta: Tensor = self.scale * (self.up.to(dtype) @ self.down.to(dtype))
        return delta

    def operands(
        self, dtype: torch.dtype, device: torch.device, bias: Tensor | None = None
    ) -> Operands | str:
        """What a call in `dtype` reads, or why the base must be called instead; `bias` [out] in
        place of the base's own."""
        check_storage(device, dtype)
        check_bias(bias, self.base, self.out_features, self.down)
        found = frozen_operands(self.base, dtype, device, bias)
        if isinstance(found, str):
            return found
        down, up = (near(p, dtype, device) for p in (self.down, self.up))
        dropout = self.dropout if self.training else 0.0
        return found._replace(down=down, up=up, scale=self.scale, dropout=dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """base(x) with the update; `bias` [out] in place of the base's own."""
        check_values("x", check_rows("x", x, self.in_features), self.down)
        dtype = compute_dtype(x)
        found = self.operands(dtype, x.device, bias)
        rows = x if x.dtype == dtype else x.to(dtype)
        if isinstance(found, Operands):
            assert found.down is not None
            assert found.up is not None
            base = {"weights": [found.weight], "biases": [found.bias]}
            return self._update(rows, found.down, found.up, **base)
        check_input(x, self.base)
        # It gets x as the model hands it over.
        y = with_bias(self.base(x), self.base, bias)
        down, up = (near(p, dtype, x.device) for p in (self.down, self.up))
        if y.dtype == dtype and y.shape[:-1] == x.shape[:-1]:
            return self._update(rows, down, up, base=[y])
        return y + self._update(rows, down, up).to(y.dtype)

    def _update(self, x: Tensor, down: Tensor, up: Tensor, **base: Any) -> Tensor:
        """The one call; the dtypes are settled, so autocast casts nothing inside."""
        rest = dict(base, scale=self.scale, dropout=self.dropout, training=self.training)
        with autocast_off(x):
            return lowrank_linear(x, down, [up], dropout_at="input", **rest)[0]

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale}, dropout={self.dropout}"


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


def check_init(name: str, value: object) -> None:
    """ValueError unless `value` names an initialisation."""
    # 1 == True: a number is none.
    if not isinstance(value, (bool, str)) or value not in INITS:
        raise ValueError(f"{name}: want one of {INITS}, got {value!r}")
