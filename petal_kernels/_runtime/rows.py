"""Matrices of rows as operators hand them to backends, and as CPU backends give them back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

TensorT = TypeVar("TensorT", Tensor, Tensor | None)

_LARGE = 4 << 20  # bytes


def flat_rows(t: TensorT) -> TensorT:
    """``t`` with its leading dims flattened, if there is one; copies only where no view has unit
    stride in the last dim and one row stride."""
    if t is None:
        return t
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def fresh_rows(like: Tensor, rows: int, cols: int) -> Tensor:
    """A result [rows, cols] that C++ kernels write whole; the hint spares large ones most of their
    page faults. The library is loaded."""
    out = like.new_empty((rows, cols))
    if out.numel() * out.element_size() >= _LARGE:
        torch.ops.petal_native.expect_whole_write(out)
    return out


def distinct(tensors: Iterable[Any]) -> list[Any]:
    """Arguments of a Function: a graph that is being compiled takes no tensor twice, so that there
    each but the first is an alias."""
    found = list(tensors)
    if torch.compiler.is_compiling():
        for n, each in enumerate(found):
            if each is not None and any(each is before for before in found[:n]):
                found[n] = each.view_as(each)
    return found
