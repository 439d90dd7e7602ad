"""Layers that take part in an attachment: what one forward shares reaches them as an argument.

A stack's pre-hook sets `state.factors`. Each of its layers binds that as a keyword of its own call,
inside the checkpointed region, so that a recompute in the backward sees what its own forward saw,
whatever has run since. While the layer's forward runs, its parts find it in the layer's slot.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from petal_kernels.nn.frozen_linear import compute_dtype


class Slot(Protocol):
    """Where the parts of one layer meet; a plain object, so that it is copied with the model."""

    state: Any  # its `factors`: of the stack's forward that runs now, else None
    call: Any
    source: Tensor | None  # of this run: where it got what `factors.source` was in the first one

    def begin(self, factors: Any) -> Any:
        """What the layer's parts see during this run."""

    def finish(self, call: Any, y: Any) -> Any:
        """The layer's output."""


class AdaptedLayer:
    """Mixin put in front of a layer's own class; restored by assigning that class back."""

    _petal_slot: Slot

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Before the checkpoint wrapper binds the keywords: its recompute sees these factors.
        state = self._petal_slot.state
        kwargs.setdefault("petal_factors", state.factors)
        kwargs.setdefault("petal_source", _where(state.factors, args, kwargs))
        if args and state.enabled and _needs_grad_input(self, args[0]):
            args = (args[0].detach().requires_grad_(), *args[1:])
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle and deepcopy make it again from the layer's own.
        return _rebuild, (_own_class(type(self)),), self.__dict__

    def forward(
        self,
        *args: Any,
        petal_factors: Any = None,
        petal_source: int | str | None = None,
        **kwargs: Any,
    ) -> Any:
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel runs replicas of one module in threads, which adapted layers do "
                "not support; use DistributedDataParallel"
            )
        slot = self._petal_slot
        call, previous = slot.begin(petal_factors), (slot.call, slot.source)
        slot.call = call
        # A recompute may be given another object: saved-tensor hooks move inputs about.
        slot.source = _argument(petal_source, args, kwargs)
        try:
            return slot.finish(call, super().forward(*args, **kwargs))  # type: ignore[misc]
        finally:
            slot.call, slot.source = previous


def _where(factors: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """The argument that the factors were computed from: its number or its name."""
    source = getattr(factors, "source", None)
    if source is not None:
        for number, value in enumerate(args):
            if value is source:
                return number
        for name, value in kwargs.items():
            if value is source:
                return name
    return None


def _argument(
    key: int | str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    if key is None:
        return None
    found: Tensor = args[key] if isinstance(key, int) else kwargs[key]
    return found


def _own_class(cls: type) -> type:
    return cls.__mro__[cls.__mro__.index(AdaptedLayer) + 1]


def _rebuild(own: type) -> Any:
    cls = adapted_class(own)
    return object.__new__(cls)


_ADAPTED: dict[type, type] = {}


def adapted_class(cls: type) -> type:
    """The subclass of `cls` whose instances take part in an attachment, made once per class."""
    if cls not in _ADAPTED:
        _ADAPTED[cls] = type(f"Petal{cls.__name__}", (AdaptedLayer, cls), {"__module__": __name__})
    return _ADAPTED[cls]


def _needs_grad_input(layer: Any, hidden: Tensor) -> bool:
    """Whether reentrant checkpointing would drop every gradient of this layer: it returns nothing
    to differentiate unless an input requires grad."""
    if hidden.requires_grad or not torch.is_grad_enabled():
        return False
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant") is not False


def shrink(x: Tensor, down: Tensor) -> Tensor:
    """x down^T in the compute dtype."""
    dtype = compute_dtype(x)
    down = down.to(device=x.device, dtype=dtype)
    if x.dtype == dtype:
        return F.linear(x, down)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), down)


def version_of(x: Tensor) -> int:
    """Grows when x is written in place."""
    # A compiled graph is functional; inference tensors keep no version.
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version
