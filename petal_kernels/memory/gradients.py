"""Gradients of a profiled step: those that are there before it, and what an optimizer finds."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from petal_kernels.memory.optimizer import Trained
from petal_kernels.memory.records import Sizes, plain_tensors, storage_bytes, storage_key
from petal_kernels.memory.timeline import Timeline

Earlier = dict[int, tuple[int, int]]  # parameter -> gradient before the step and its version


@contextlib.contextmanager
def put_back(trained: Sequence[Tensor], accumulate: bool | None) -> Iterator[Earlier]:
    """Gradients are afterwards what they were; where gradients are to be there, others of their
    size take the sums meanwhile. Yields which, by parameter.
    """
    there: Earlier = {}
    before = [t.grad for t in trained]
    try:
        for t in trained:
            wanted = t.grad is not None if accumulate is None else accumulate
            like = t if t.grad is None else t.grad
            t.grad = torch.zeros_like(like.detach()) if wanted else None
            if t.grad is not None:
                there[id(t)] = (id(t.grad), t.grad._version)
        yield there
    finally:
        for t, grad in zip(trained, before, strict=True):
            t.grad = grad


def add_earlier(trained: Mapping[str, Tensor], timeline: Timeline) -> None:
    """Counts those that are there before the step."""
    for name, t in trained.items():
        if t.grad is not None:
            timeline.add(t.grad, "gradients", name)


def forget_the_unreached(there: Earlier, trained: Sequence[Tensor], timeline: Timeline) -> None:
    """A parameter that this backward does not reach had no gradient of an earlier one, either."""
    for t in trained:
        if t.grad is not None and there.get(id(t)) == (id(t.grad), t.grad._version):
            timeline.forget(t.grad)
            t.grad = None


def count(trained: Mapping[str, Tensor], there: Earlier, sizes: Sizes) -> None:
    """Bytes of all gradients, and of those that were there before the step: of storages, for
    engines that shard or bucket gradients make them pieces of one.
    """
    found: dict[int, tuple[int, bool]] = {}
    for t in trained.values():
        for part in [] if t.grad is None else plain_tensors(t.grad):
            found[storage_key(part)] = (storage_bytes(part), id(t) in there)
    sizes.gradients = sum(size for size, _ in found.values())
    sizes.earlier_gradients = sum(size for size, earlier in found.values() if earlier)


def as_moved(name: str, t: Tensor) -> Trained:
    """A parameter as an optimizer finds it after the backward."""
    numbers = sum(part.numel() for part in plain_tensors(t))
    return Trained(name, numbers, t.dtype, t.device.type, t.grad is not None, weakref.ref(t))
