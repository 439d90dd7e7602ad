"""Models that fit no machine: shapes without storage.

A model is built on the `meta` device, where building a 7B model takes seconds and no memory, and
becomes fake tensors of a pretended CPU afterwards: built under FakeTensorMode, its initialisation
would depend on data that is not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from petal_kernels.memory.modules import ModuleStack
from petal_kernels.memory.records import storage_bytes, storage_key, tensors_in


def fake_tensors(model: nn.Module, batch: Any) -> tuple[nn.Module, Any]:
    """The very model, its parameters and buffers replaced by fake ones where they are (what is tied
    or shares a storage still does), and the batch likewise. Only shapes can be computed with it
    from now on.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: want a torch.nn.Module, got a {type(model).__name__}")
    twins = _Twins()
    # Originals are held: the identity of one that is gone could be met again.
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        owned: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for parts in owned:
            for name, value in list(parts.items()):
                if value is None or isinstance(value, FakeTensor):
                    continue
                if id(value) not in made:
                    new = twins.of(value)
                    if isinstance(value, nn.Parameter):
                        new = nn.Parameter(new, value.requires_grad)
                    made[id(value)] = (value, new)
                parts[name] = made[id(value)][1]
    return model, tree_map(lambda v: twins.of(v) if isinstance(v, Tensor) else v, batch)


class _Twins:
    """Fake tensors of one mode, for real ones; of one storage, where the real ones are."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._bases: dict[int, tuple[Tensor, Tensor]] = {}  # a storage's first, and its twin

    def of(self, t: Tensor) -> Tensor:
        plain = t.layout == torch.strided and not is_traceable_wrapper_subclass(t)
        with self._mode:
            twin = self._piece(t) if plain else self._alone(t)
        return twin.requires_grad_(t.requires_grad)

    def _alone(self, t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")

    def _piece(self, t: Tensor) -> Tensor:
        key, size = storage_key(t), storage_bytes(t)
        if key not in self._bases:
            whole = size == t.numel() * t.itemsize
            twin = self._alone(t) if whole else torch.empty(size, dtype=torch.uint8)
            self._bases[key] = (t, twin)
            if whole:
                return twin
        base = self._bases[key][1].detach()
        flat = base.as_strided((base.untyped_storage().nbytes() // base.itemsize,), (1,), 0)
        if flat.dtype != t.dtype:
            flat = flat.view(torch.uint8)[: size // t.itemsize * t.itemsize].view(t.dtype)
        return flat.as_strided(t.shape, t.stride(), t.storage_offset()).detach()


def mode_of(model: nn.Module | None, batch: Any) -> FakeTensorMode | None:
    """The mode whose tensors these are; None for real ones. Raises for tensors on `meta`."""
    parameters = [] if model is None else list(model.parameters())
    for t in [*parameters, *tensors_in(batch)]:
        if isinstance(t, FakeTensor):
            return t.fake_mode
        if isinstance(t, Tensor) and t.device.type == "meta":
            raise ValueError(
                "model and batch: want real tensors or fake ones, got some on the meta device; "
                "make them fake with petal_kernels.memory.fake_tensors(model, batch)"
            )
    return None


def running(mode: FakeTensorMode, batch: Any) -> contextlib.AbstractContextManager[Any]:
    """What a step on fake tensors runs in: their mode, so that all that it makes is fake; but where
    the batch has real tensors, what is made of these alone stays real and can be asked for values.
    """
    real = any(not isinstance(t, FakeTensor) for t in tensors_in(batch))
    return _RealMasks() if real else mode


class _RealMasks(TorchFunctionMode):
    """While entered, a real mask that picks elements of a fake tensor is the list of their places,
    which has a shape.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], FakeTensor):
            args = (args[0], _places(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def _places(index: Any) -> Any:
    """An index with the places of a real mask instead of the mask."""
    found: list[Any] = []
    for each in index if isinstance(index, tuple) else (index,):
        mask = isinstance(each, Tensor) and each.dtype == torch.bool and each.dim() > 0
        real = mask and not isinstance(each, FakeTensor)
        found += each.nonzero(as_tuple=True) if real else [each]
    return tuple(found)


@contextlib.contextmanager
def named_failures(stack: ModuleStack, mode: FakeTensorMode | None) -> Iterator[None]:
    """What torch raises where shapes are not enough says which module asked, and the way out."""
    try:
        yield
    except Exception as error:
        if mode is None or not _raised_by_torch(error):
            raise
        place = stack.raised_in(error.__traceback__)
        kind = stack.kinds.get(place, "")
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"model: {place or 'the model itself'}{f' ({kind})' if kind else ''} does not run on "
            f"fake tensors, which have shapes and no values ({type(error).__name__}: {first}). "
            "Give those of the batch that it asks for values (ids, sizes of images) as real ones, "
            "or profile it on real tensors, if need be with fewer layers: each keeps the same"
        ) from error


def _raised_by_torch(error: BaseException) -> bool:
    """Whether the innermost frame is torch's, not the model's own."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    return Path(traceback.tb_frame.f_code.co_filename).is_relative_to(Path(torch.__file__).parent)
