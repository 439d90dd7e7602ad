"""The arguments of ``mode_contract``: what backends receive and give back, and the checks of what
users give."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from petal_kernels._runtime import checks


class Given(NamedTuple):
    """The public function's arguments, as they came."""

    core: Any
    modes: Any
    up: Any
    scale: Any
    dtype: Any
    backend: Any


class Call(NamedTuple):
    """One call as a backend gets it, in the order of the raw operator's schema."""

    core: Tensor  # [R, R, R] (Tucker) or [R] (CP)
    modes: Tensor  # [K, R]
    up: Tensor | None  # V [O, R]
    scale: float
    dtype: torch.dtype  # of the result

    @property
    def shape(self) -> tuple[int, int, int]:
        """[K, R, O] of the result as it is stored, or [K, R, R] without ``up``."""
        count, rank = self.modes.shape
        return count, rank, rank if self.up is None else self.up.shape[0]

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.core.device

    @property
    def is_cuda(self) -> bool:
        """Whether that is a GPU."""
        return self.core.is_cuda


class Gradients(NamedTuple):
    """What a backward returns, each in its tensor's dtype; None where it was not asked for."""

    core: Tensor | None = None
    modes: Tensor | None = None
    up: Tensor | None = None


def check(given: Given) -> Call:
    """Raise TypeError or ValueError, naming the argument, or return the call."""
    core, modes, up, scale, dtype, _ = given
    checks.check_floating("core", core)
    checks.check_floating("modes", modes)
    if core.dim() == 3:
        rank = core.shape[0]
        checks.check_shape("core", core, (rank, rank, rank))
    elif core.dim() != 1:
        raise ValueError(f"core: want shape [R] (CP) or [R, R, R] (Tucker), got {list(core.shape)}")
    rank = core.shape[0]
    if rank < 1:
        raise ValueError(f"core: want rank R >= 1, got {list(core.shape)}")
    checks.check_shape("modes", modes, ("K", rank))
    others = [("modes", modes)]
    if up is not None:
        checks.check_floating("up", up)
        checks.check_shape("up", up, ("O", rank))
        others.append(("up", up))
    for name, tensor in others:
        checks.check_dtype(name, tensor, (core.dtype,), " like core")
        checks.check_device(name, tensor, core.device)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in checks.FLOATING):
        got = dtype if isinstance(dtype, torch.dtype) else f"a {type(dtype).__name__}"
        raise TypeError(f"dtype: want a floating dtype, got {got}")
    number = checks.check_number("scale", scale)
    return Call(core, modes, up, number, core.dtype if dtype is None else dtype)
