"""The arguments of ``frozen_norm``: what backends receive, and the checks of what users give."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from petal_kernels._runtime import checks

KINDS = ("layer", "rms", "rms_once", "rms_plus_one")


class Given(NamedTuple):
    """The public function's arguments, as they came."""

    x: Any
    weight: Any
    bias: Any
    kind: Any
    eps: Any
    recompute: Any
    backend: Any


class Call(NamedTuple):
    """One call as a backend gets it."""

    x: Tensor  # [N, D], unit stride in the last dim
    weight: Tensor | None  # [D], contiguous
    bias: Tensor | None  # [D], contiguous; of kind "layer" alone
    kind: str  # of KINDS
    eps: float  # forward only

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.x.device

    @property
    def is_cuda(self) -> bool:
        """Whether that is a GPU."""
        return self.x.is_cuda

    @property
    def centered(self) -> bool:
        """Whether the mean is taken off."""
        return self.kind == "layer"

    @property
    def rounded(self) -> bool:
        """Whether the normalised rows are rounded to x's dtype before the weight."""
        return self.kind == "rms"

    @property
    def offset(self) -> float:
        """What is added to the weight."""
        return 1.0 if self.kind == "rms_plus_one" else 0.0


def moments_per_row(kind: str) -> int:
    """How many numbers are kept of a row: rho, behind the mean where that is taken off."""
    return 2 if kind == "layer" else 1


def check(given: Given) -> Call:
    """Raise TypeError or ValueError, naming the argument, or return the call."""
    x = checks.check_floating("x", given.x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: want shape [..., D] with D >= 1, got {list(x.shape)}")
    checks.check_choice("kind", given.kind, KINDS)
    if given.bias is not None and given.kind != "layer":
        raise ValueError(f"bias: want None with kind={given.kind!r}, got a value")
    for name, t in (("weight", given.weight), ("bias", given.bias)):
        if t is None:
            continue
        checks.check_shape(name, checks.check_tensor(name, t), (x.shape[-1],))
        checks.check_dtype(name, t, (x.dtype,), " like x")
        checks.check_device(name, t, x.device)
        if t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: want a frozen tensor, got one that requires grad")
    eps = checks.check_number("eps", given.eps)
    if not 0.0 <= eps <= float(torch.finfo(torch.float32).max):
        raise ValueError(f"eps: want a number >= 0 that float32 holds, got {eps}")
    checks.check_bool("recompute", given.recompute)
    return Call(x, given.weight, given.bias, given.kind, eps)
