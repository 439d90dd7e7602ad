"""Matrices of rows as operators hand them to backends, and as CPU backends give them back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from petal_kernels._runtime import front

TensorT = TypeVar("TensorT", Tensor, Tensor | None)

_LARGE = 4 << 20  # bytes


def flat_rows(t: TensorT) -> TensorT:
    """``t`` with its leading dims flattened, if there is one; copies only where no view has unit
    stride in the last dim and one row stride."""
    if t is None:
        return t
    flat = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def result_of(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Fresh rows as an operator gives them back: contiguous, with leading dims, and no view of the
    matrix that they were, which autograd would let nobody write in place."""
    out: Tensor = torch.ops.aten._unsafe_view.default(rows.contiguous(), shape)
    return out


def is_large(x: Tensor, *matrices: Tensor) -> bool:
    """Whether one of the results [..., width] of x's rows, as wide as x or as a matrix is high, is
    so large that `fresh_rows` asks for its memory in another way."""
    width = max(x.shape[-1], *(matrix.shape[0] for matrix in matrices))
    return x.shape[:-1].numel() * width * x.element_size() >= _LARGE


def fresh_rows(like: Tensor, rows: int, cols: int) -> Tensor:
    """A result [rows, cols] that C++ kernels write whole; the hint spares large ones most of their
    page faults. The library is loaded."""
    out = like.new_empty((rows, cols))
    if out.numel() * out.element_size() >= _LARGE:
        torch.ops.petal_native.expect_whole_write(out)
    return out


def linears(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The library's products x [N, D] w^T, each in fresh rows."""
    short = front.load()
    ys: list[Tensor] | None = None if short is None else short.linears(x, weights)
    if ys is None:
        ys = [fresh_rows(x, x.shape[0], w.shape[0]) for w in weights]
        for y, w in zip(ys, weights, strict=True):
            torch.mm(x, w.t(), out=y)
    return ys


def sum_of_products(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The library's sum of dy [N, O_k] w_k, in fresh rows."""
    short = front.load()
    dx: Tensor | None = None if short is None else short.sums(dys, weights)
    if dx is None:
        dx = fresh_rows(dys[0], dys[0].shape[0], weights[0].shape[1])
        torch.mm(dys[0], weights[0], out=dx)
        for dy, w in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, w)
    return dx


def distinct(tensors: Iterable[Any]) -> list[Any]:
    """Arguments of a Function: a graph that is being compiled takes no tensor twice, so that there
    each but the first is an alias."""
    found = list(tensors)
    if torch.compiler.is_compiling():
        for n, each in enumerate(found):
            if each is not None and any(each is before for before in found[:n]):
                found[n] = each.view_as(each)
    return found
