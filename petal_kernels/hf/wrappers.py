"""What stands where a linear stood."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels.hf.context import now
from petal_kernels.hf.parts import LayerPart
from petal_kernels.nn.frozen_linear import MERGED_TRAINING, FrozenLinear
from petal_kernels.nn.routed_lora import linear_features


class AdaptedLinear(FrozenLinear):
    """A linear with an adapter that is registered at the model's root.

    Where the call is off, or the update is merged into the weight, the linear runs alone.
    """

    layer: LayerPart
    merged: nn.Parameter | None  # the weight without the update that now lies in it

    def __init__(self, base: nn.Module, layer: LayerPart) -> None:
        super().__init__(base)
        self.__dict__["layer"] = layer
        self.__dict__["merged"] = None

    @property
    def in_features(self) -> int:
        return linear_features(self.base)[0]

    @property
    def out_features(self) -> int:
        return linear_features(self.base)[1]

    def forward(self, x: Tensor) -> Tensor:
        if not now(self.layer.method).on:
            return self._without(x)
        if self.merged is None:
            return self.adapted(x)
        if self.training:
            raise RuntimeError(MERGED_TRAINING)
        return self.with_merged(x)

    @abstractmethod
    def adapted(self, x: Tensor) -> Tensor:
        """The linear's output with the update."""

    def with_merged(self, x: Tensor) -> Tensor:
        """The same where the update lies in the weight."""
        return super().forward(x)

    def _without(self, x: Tensor) -> Tensor:
        if self.merged is None:
            return super().forward(x)
        # Plain, else nothing would be merged.
        weight = self.merged.to(self.base._parameters["weight"])
        matrix = weight if isinstance(self.base, nn.Linear) else weight.t()
        return F.linear(x, matrix, self.base._parameters.get("bias"))

    # -- merging ----------------------------------------------------------------------------------

    def unit(self) -> object:
        """What must be merged together with this one has the same unit."""
        return self

    def delta(self, dtype: torch.dtype) -> Tensor | str:
        """The weight that the update is, or why it is none."""
        raise NotImplementedError

    def used(self) -> nn.Module:
        """Whose parameters the update is made of."""
        raise NotImplementedError
