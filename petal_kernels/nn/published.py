"""The eager published form of the layers, one mode at a time: the oracle of the fused ones.

Written as the paper's steps and nothing else. It owns no parameter: it reads the same
`ModeApproximation` and `ScaleShift` objects as the fused layers, so that the two can be compared
tensor by tensor and timed side by side from one state dict.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels.nn.frozen_linear import MERGED_TRAINING, FrozenLinear
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.residual import CONTEXT_SCALE, RESIDUAL_SCALE, ScaleShift


class PublishedModeLinear(FrozenLinear):
    """y = base(x) + s (dropout(x U^T) M) V^T for one mode p of the shared factors."""

    factors: ModeApproximation
    dropout: nn.Module

    def __init__(self, base: nn.Module, factors: ModeApproximation, mode: int) -> None:
        super().__init__(base)
        self.mode = mode
        self.enabled = True
        self.merged = False
        # References, not children: the factors are registered once, at the model's root.
        self.__dict__["factors"] = factors
        self.__dict__["dropout"] = nn.Dropout(factors.dropout).train(base.training)

    def train(self, mode: bool = True) -> PublishedModeLinear:
        super().train(mode)
        self.dropout.train(mode)
        return self

    def update(self, x: Tensor) -> Tensor:
        factors = self.factors
        p = factors.modes[self.mode]
        z = self.dropout(F.linear(x, factors.down.to(_weight_dtype(x))))
        if factors.core_kind == "cp":
            w = z * (factors.core * p).to(z.dtype)
        else:
            w = z @ torch.einsum("abc,c->ab", factors.core, p).to(z.dtype)
        return factors.scale * F.linear(w, factors.up.to(_weight_dtype(w)))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged and self.training:
            raise RuntimeError(MERGED_TRAINING)
        if self.merged or not self.enabled:
            return super().forward(x)
        return super().forward(x) + self.update(x)


def _weight_dtype(x: Tensor) -> torch.dtype:
    """float32 weights stay as they are under autocast, which casts them itself."""
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype


def published_residual(y: Tensor, a: Tensor, pair: ScaleShift) -> Tensor:
    """y + 0.1 (a * s + t)."""
    scale, shift = pair.scale.to(a.dtype), pair.shift.to(a.dtype)
    return y + RESIDUAL_SCALE * (a * scale + shift)


def published_context(c: Tensor, a: Tensor) -> Tensor:
    """c[:, 0] += 0.1 mean_b a[:, 0], in place."""
    context = torch.mean(a[:, 0, :], dim=0)
    c[:, 0, :] += CONTEXT_SCALE * context
    return c
