"""What stands where a linear stood."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels.hf.context import now
from petal_kernels.hf.parts import LayerPart
from petal_kernels.nn.frozen_linear import MERGED_TRAINING, FrozenLinear, with_bias
from petal_kernels.nn.routed_lora import linear_features

if TYPE_CHECKING:
    from petal_kernels.hf.method import Method


class AdaptedLinear(FrozenLinear):
    """A linear with an adapter that is registered at the model's root.

    Where the call is off, or the update is merged into the weight, the linear runs alone; with
    `bias`, the module whose bias is trained in place of its own, where the call is on.
    """

    method: Method
    merged: nn.Parameter | None  # the weight without the update that now lies in it
    partly: bool

    def __init__(self, base: nn.Module, method: Method, bias: nn.Module | None = None) -> None:
        super().__init__(base)
        self.__dict__["method"] = method
        # A reference, no child: it is registered at the model's root.
        self.__dict__["bias_of"] = bias
        self.__dict__["merged"] = None
        self.__dict__["partly"] = False  # merged, and other parts of the adapter stay beside it

    @property
    def in_features(self) -> int:
        return linear_features(self.base)[0]

    @property
    def out_features(self) -> int:
        return linear_features(self.base)[1]

    def forward(self, x: Tensor) -> Tensor:
        if not now(self.method).on:
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
        """The same where the update lies in the weight: the linear alone, with its trained bias."""
        return with_bias(super().forward(x), self.base, self.trained_bias())

    def trained_bias(self) -> Tensor | None:
        """The bias that is trained in place of the linear's own."""
        holder: nn.Module | None = self.__dict__["bias_of"]
        return None if holder is None else holder._parameters["bias"]

    def _without(self, x: Tensor) -> Tensor:
        if self.merged is None:
            return super().forward(x)
        # Plain, else nothing would be merged.
        weight = self.merged.to(self.base._parameters["weight"])
        matrix = weight if isinstance(self.base, nn.Linear) else weight.t()
        return F.linear(x, matrix, self.base._parameters.get("bias"))

    # A checkpoint that holds an adapter beside weights with its update would apply it twice.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.partly and self.merged is not None:
            destination[f"{prefix}weight"] = self.merged if keep_vars else self.merged.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        state, prefix = args[:2]
        if self.partly and f"{prefix}weight" in state:
            args[-1].append(
                f"{prefix}weight: want an unmerged model, since its adapter does not fold whole; "
                "call unmerge() first"
            )
            return
        super()._load_from_state_dict(*args, **kwargs)

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


class LayerLinear(AdaptedLinear):
    """One whose update depends on the layer's call."""

    layer: LayerPart

    def __init__(self, base: nn.Module, layer: LayerPart, bias: nn.Module | None = None) -> None:
        super().__init__(base, layer.method, bias)
        self.__dict__["layer"] = layer
