"""What a method says of its authors' checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from petal_kernels.hf.method import Method


def only(value: Tensor) -> Tensor:
    """One of theirs as it is."""
    return value


def rows(*values: Tensor) -> Tensor:
    """Several of theirs below each other."""
    return torch.cat(values)


def stacked(*values: Tensor) -> Tensor:
    """Several of theirs in a new first dimension."""
    return torch.stack(values)


def flat(value: Tensor) -> Tensor:
    """A linear with one output as the vector that it is."""
    return value.reshape(-1)


@dataclass(frozen=True)
class Source:
    """Where one tensor of an adapter comes from."""

    names: tuple[str, ...]  # theirs, in order
    make: Callable[..., Tensor] = only  # ours of them; ValueError where they do not fit

    @classmethod
    def of(cls, name: str, make: Callable[..., Tensor] = only) -> Source:
        """From one of theirs."""
        return cls((name,), make)


@dataclass(frozen=True)
class Layout:
    """The names of a checkpoint. Regular expressions match from a name's beginning."""

    sources: dict[str, Source]  # by our names
    words: str  # what the name of an adapter's tensor has in it: none of these may be left
    base: str  # how the names of their base's tensors begin
    beside: str = "$^"  # tensors that belong to neither: momentum copies, queues


def modules_of(method: Method) -> Iterator[tuple[Any, str]]:
    """The places that have an adapter of their own, and its name; one that several share once for
    each."""
    names = {id(module): name for name, module in method.adapter.named_modules()}
    for place in method.found.places:
        module = method.trains(place)
        if module is not None:
            yield place, names[id(module)]
