"""The eager published form of a projection adapted block by block: the oracle of `blocks.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels.hf.aurora.blocks import Blocks
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.published import PublishedLinear, weight_dtype


class PublishedBlocks(PublishedLinear):
    """outputs: base(x) + s [drop(x U^T [M_1 .. M_n])_k V^T for every k];
    inputs: base(x) + s drop([x_1 U^T .. x_n U^T] [M_1; ..; M_n]) V^T."""

    def __init__(self, base: nn.Module, factors: ModeApproximation, blocks: Blocks) -> None:
        super().__init__(base, factors)
        self.blocks = blocks

    def _table(self) -> Tensor:
        """[M_1 .. M_n] ([R, n R]) for outputs, [M_1; ..; M_n] ([n R, R]) for inputs."""
        core, inputs = self.factors.core, self.blocks.form == "inputs"
        p = self.factors.modes[self.blocks.modes.start : self.blocks.modes.stop]
        if self.factors.core_kind == "cp":
            modes = torch.stack([torch.diag(core * each) for each in p], dim=-1)
        else:
            modes = torch.stack([torch.einsum("abc,c->ab", core, each) for each in p], dim=-1)
        if self.blocks.mixed:
            table = modes.reshape(modes.shape[0], -1)
            return table.t() if inputs else table
        return torch.cat(modes.unbind(-1), dim=0 if inputs else 1)

    def update(self, x: Tensor) -> Tensor:
        factors, dtype = self.factors, weight_dtype(x)
        down, up = factors.down.to(dtype), factors.up.to(dtype)
        if self.blocks.form == "outputs":
            z = F.linear(x, down)
            w = self.dropout(z @ self._table().to(z.dtype))
            pieces = [F.linear(piece, up) for piece in w.split(factors.r, dim=-1)]
            return factors.scale * torch.cat(pieces, dim=-1)
        z = torch.cat([F.linear(block, down) for block in x.split(factors.in_features, -1)], dim=-1)
        return factors.scale * F.linear(self.dropout(z @ self._table().to(z.dtype)), up)
