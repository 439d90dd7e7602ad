"""What a profile is made of: tensors kept for backward, their keepers, and blocks of memory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MIB = 2**20
MODEL = "(the model itself)"  # where a path is empty
_INDEX = re.compile(r"(^|\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Keeper:
    """One place in the graph that keeps a tensor: which module's, which operation, as what."""

    module: str
    operation: str
    argument: str

    def __str__(self) -> str:
        return f"{self.module or MODEL}: {self.operation}.{self.argument}"


@dataclass
class Saved:
    """One storage kept for backward. `shape` and `dtype` are those of the first tensor in it that
    was kept, `bytes` the whole storage's: a view keeps all of it.
    """

    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: str
    kind: str  # class of the module
    role: str  # "trainable", "frozen" or "" (no parameter anywhere around)
    operation: str
    argument: str
    why: str
    useful: bool = True  # False: nothing trainable lies behind it, no gradient needs it
    of_batch: bool = False
    also: tuple[Keeper, ...] = ()
    copy_of: int | None = None  # number of the tensor that this is a converted copy of
    source: str = ""  # that tensor's name, where it is a parameter

    @property
    def is_view(self) -> bool:
        return torch.Size(self.shape).numel() * self.dtype.itemsize < self.bytes

    @property
    def place(self) -> str:
        """The module's path with every number in it replaced by a star."""
        return collapse(self.module)


@dataclass
class Block:
    """One storage over time, in steps of the timeline; `died` is None while it lives."""

    bytes: int
    born: int
    operation: str
    module: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    category: str = "temporary"
    died: int | None = None
    number: int = 0
    copy_of: int | None = None

    def lives_at(self, step: int) -> bool:
        return self.born <= step and (self.died is None or self.died > step)


@dataclass
class Recomputed:
    """What the recomputation of one checkpointed region brought to life in backward."""

    module: str
    bytes: int


@dataclass
class Sizes:
    """Bytes that are there whatever the activations do."""

    parameters: int = 0
    trainable: int = 0
    trainable_numbers: int = 0
    buffers: int = 0
    batch: int = 0
    gradients: int = 0
    earlier_gradients: int = 0  # of `gradients`: there before the step
    states: int = 0  # of an optimizer
    outputs: int = 0
    elsewhere: int = 0
    saved_parameters: dict[str, int] = field(default_factory=dict)


def collapse(path: str) -> str:
    """`a.3.b` -> `a.*.b`: the layers of one stack are one row of a table."""
    return _INDEX.sub(r"\1*", path)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in an output or a batch: in mappings, sequences and dataclasses of any depth."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        parts: Iterable[Any] = tree.values()
    elif isinstance(tree, (tuple, list)):
        parts = tree
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        parts = [getattr(tree, f.name) for f in dataclasses.fields(tree)]
    else:
        return []
    return [t for part in parts for t in tensors_in(part)]


def plain_tensors(t: Tensor) -> Iterator[Tensor]:
    """The tensors with a storage of their own inside `t`: itself, or the parts of a wrapper (a
    DTensor, a quantised tensor).
    """
    if is_traceable_wrapper_subclass(t):
        names, _ = t.__tensor_flatten__()
        for name in names:
            part = getattr(t, name)
            if isinstance(part, Tensor):  # a DTensor lists its mesh, too
                yield from plain_tensors(part)
    elif t.layout == torch.strided:
        yield t
    else:
        parts = (
            (t._indices(), t._values())
            if t.layout == torch.sparse_coo
            else (t.values(),)  # compressed layouts: the indices are small beside them
        )
        yield from parts


def storage_key(t: Tensor) -> int:
    """Identity of the storage under a plain tensor, unique while the storage lives."""
    return int(t.untyped_storage()._cdata)


def storage_bytes(t: Tensor) -> int:
    """Size of the storage under a plain tensor."""
    return int(t.untyped_storage().nbytes())


def mib(count: float) -> str:
    """Bytes as text, in the unit that leaves one to four digits before the point."""
    if abs(count) < 10_000:
        return f"{count:.0f} B"
    if abs(count) < MIB:
        return f"{count / 1024:.1f} KiB"
    if abs(count) < 10_000 * MIB:
        return f"{count / MIB:.1f} MiB"
    return f"{count / 2**30:.2f} GiB"
