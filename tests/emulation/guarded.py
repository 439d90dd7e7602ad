"""Outputs that lie inside larger buffers, so that a write outside them is seen."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Guarded:
    """Matrices inside larger buffers whose other elements must stay as they are."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def matrix(self, rows: int, cols: int, dtype: torch.dtype, pad: int) -> Tensor:
        """Rows of a stride of their own."""
        stride = cols + pad + 8
        if pad % 8 == 0:
            stride += -stride % 8  # 16-byte accesses next to a ragged last group of columns
        buffer = torch.full((rows + 8, stride), 777.0, dtype=dtype)
        view = buffer[4 : 4 + rows, :cols]
        self.buffers.append((buffer, view))
        return view

    def flat(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Dense, of any shape."""
        size = int(np.prod(shape))
        buffer = torch.full((size + 128,), 777.0, dtype=dtype)
        view = buffer[64 : 64 + size]
        self.buffers.append((buffer, view))
        return view.view(shape)

    def check(self) -> None:
        """Raise unless all of every output was written, and nothing beside it."""
        for buffer, view in self.buffers:
            assert (view != 777.0).all(), "an output element was not written"
            view.fill_(777.0)
            assert (buffer == 777.0).all(), "a write outside an output"
