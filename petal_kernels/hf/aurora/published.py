"""The eager published form of a projection adapted block by block: the oracle of `blocks.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels.hf.aurora.blocks import Blocks
from petal_kernels.nn.frozen_linear import MERGED_TRAINING, FrozenLinear
from petal_kernels.nn.mode_approximation import ModeApproximation


class PublishedBlocks(FrozenLinear):
    """outputs: base(x) + s [drop(x U^T [M_1 .. M_n])_k V^T for every k];
    inputs: base(x) + s drop([x_1 U^T .. x_n U^T] [M_1; ..; M_n]) V^T."""

    shared: ModeApproximation
    dropout: nn.Module

    def __init__(self, base: nn.Module, shared: ModeApproximation, blocks: Blocks) -> None:
        super().__init__(base)
        self.blocks = blocks
        self.enabled = True
        self.merged = False
        # References, not children: the factors are registered once, at the model's root.
        self.__dict__["shared"] = shared
        self.__dict__["dropout"] = nn.Dropout(shared.dropout).train(base.training)

    def train(self, mode: bool = True) -> PublishedBlocks:
        super().train(mode)
        self.dropout.train(mode)
        return self

    def _table(self) -> Tensor:
        """[M_1 .. M_n] ([R, n R]) for outputs, [M_1; ..; M_n] ([n R, R]) for inputs."""
        core, inputs = self.shared.core, self.blocks.form == "inputs"
        p = self.shared.modes[self.blocks.modes.start : self.blocks.modes.stop]
        if self.shared.core_kind == "cp":
            modes = torch.stack([torch.diag(core * each) for each in p], dim=-1)
        else:
            modes = torch.stack([torch.einsum("abc,c->ab", core, each) for each in p], dim=-1)
        if self.blocks.mixed:
            table = modes.reshape(modes.shape[0], -1)
            return table.t() if inputs else table
        return torch.cat(modes.unbind(-1), dim=0 if inputs else 1)

    def update(self, x: Tensor) -> Tensor:
        shared = self.shared
        dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
        down, up = shared.down.to(dtype), shared.up.to(dtype)
        if self.blocks.form == "outputs":
            z = F.linear(x, down)
            w = self.dropout(z @ self._table().to(z.dtype))
            pieces = [F.linear(piece, up) for piece in w.split(shared.r, dim=-1)]
            return shared.scale * torch.cat(pieces, dim=-1)
        z = torch.cat([F.linear(block, down) for block in x.split(shared.in_features, -1)], dim=-1)
        return shared.scale * F.linear(self.dropout(z @ self._table().to(z.dtype)), up)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged and self.training:
            raise RuntimeError(MERGED_TRAINING)
        if self.merged or not self.enabled:
            return super().forward(x)
        return super().forward(x) + self.update(x)
