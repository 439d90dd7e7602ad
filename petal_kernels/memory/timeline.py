"""Live bytes after every operation of forward and backward, for real and for fake tensors.

A dispatch mode sees each operation's results; a finaliser on a result's storage sees its end. What
an operation allocates and frees inside itself (a kernel's workspace) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petal_kernels.memory.modules import ModuleStack
from petal_kernels.memory.records import (
    Block,
    Recomputed,
    plain_tensors,
    storage_bytes,
    storage_key,
)

RESIDENT = ("parameters", "buffers", "batch", "optimizer states")  # there before the step
CATEGORIES = (
    *RESIDENT,
    "gradients",
    "saved for backward",
    "outputs",
    "elsewhere",
    "recomputed",
    "temporary",
)
_COPIES = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.native_dropout.default,
}


class Timeline(TorchDispatchMode):
    """Blocks and the curve of live bytes. `phase` is what the caller says it is."""

    def __init__(self, stack: ModuleStack) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: list[int] = []
        self.phases: dict[str, int] = {}  # phase -> first step
        self.blocks: list[Block] = []
        self.recomputed: list[Recomputed] = []
        self._stack = stack
        self._now = 0
        self._alive: dict[int, Block] = {}
        self._finalizers: dict[int, weakref.finalize[Any, Any]] = {}
        self._names: dict[int, str] = {}
        self._phase = ""
        self._region: _Region | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs as it would without this mode, in every thread; torch would otherwise
        run it eagerly, and ever after.
        """
        return True

    def begin(self, phase: str) -> None:
        """What follows belongs to `phase`."""
        self._phase = phase
        self.phases[phase] = len(self.live)

    def add(self, t: Tensor, category: str, name: str) -> None:
        """Counts the storage of a tensor that is there before the step."""
        for part in plain_tensors(t):
            self._add(part, category, name=name)

    def categorise(self, key: int, category: str) -> None:
        """Says what a storage is for, once that is known."""
        block = self._alive.get(key)
        if block is not None and block.category == "temporary":
            block.category = category

    def block(self, key: int) -> Block | None:
        """The living block of a storage."""
        return self._alive.get(key)

    def name_of(self, number: int | None) -> str:
        """The name of the parameter or buffer that block `number` is, or nothing."""
        return "" if number is None else self._names.get(number, "")

    def living(self) -> dict[int, Block]:
        """What lives now, by the identity of its storage."""
        return dict(self._alive)

    def alive(self) -> list[Block]:
        """What lives now."""
        return list(self._alive.values())

    def close(self) -> None:
        """Lets go of storages that live on."""
        for finalizer in self._finalizers.values():
            finalizer.detach()
        self._finalizers.clear()

    def forget(self, t: Tensor) -> None:
        """As if the storage of a tensor that was there before the step had not been."""
        for part in plain_tensors(t):
            block = self._alive[storage_key(part)]
            self.live = [size - block.bytes for size in self.live]
            self.free(storage_key(part))
            self.blocks.remove(block)

    def peak_step(self) -> int:
        """The first step with the most live bytes."""
        return max(range(len(self.live)), key=self.live.__getitem__, default=0)

    def phase_at(self, step: int) -> str:
        """The phase of a step."""
        return max((begin, name) for name, begin in self.phases.items() if begin <= step)[1]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        # Backward runs no module and no gradients, unless it runs a piece of the forward again.
        again = self._phase == "backward" and (self._stack.running or torch.is_grad_enabled())
        if again and self._region is None:
            self._region = _Region(self._now)
        elif self._region is not None and not again:
            result = self._region.result()
            self.recomputed += [result] if result.bytes else []
            self._region = None
        out = func(*args, **(kwargs or {}))
        source = None
        if func in _COPIES and isinstance(args[0], Tensor):
            source = self._source(args[0])
        category = "recomputed" if again else "temporary"
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for t in results:
            for part in plain_tensors(t):
                self._add(part, category, str(func), copy_of=source)
        if self._region is not None:
            self._region.visit(self._stack.current, self._now)
        # Neither a question (a fake tensor's device) nor detach(): most are this profiler's own.
        if results and func is not torch.ops.aten.detach.default:
            self.live.append(self._now)
        return out

    def _source(self, t: Tensor) -> int | None:
        """The block under `t`, or what that was copied from: copies of copies have one source."""
        block = self._alive.get(storage_key(next(plain_tensors(t))))
        if block is None:
            return None
        return block.number if block.copy_of is None else block.copy_of

    def _add(
        self,
        part: Tensor,
        category: str,
        operation: str = "",
        name: str = "",
        copy_of: int | None = None,
    ) -> None:
        key = storage_key(part)
        if key in self._alive:
            return
        size = storage_bytes(part)
        block = Block(
            bytes=size,
            born=len(self.live),
            operation=operation.removesuffix(".default"),
            module=name or self._stack.current,
            shape=tuple(part.shape),
            dtype=part.dtype,
            category=category,
            number=len(self.blocks),
            copy_of=copy_of,
        )
        if category in ("parameters", "buffers"):
            self._names[block.number] = name
        self.blocks.append(block)
        self._alive[key] = block
        self._now += size
        finalizer = weakref.finalize(part.untyped_storage(), _free, weakref.ref(self), key)
        finalizer.atexit = False
        self._finalizers[key] = finalizer

    def free(self, key: int) -> None:
        """A storage has gone."""
        block = self._alive.pop(key, None)
        self._finalizers.pop(key, None)
        if block is not None:
            block.died = len(self.live)
            self._now -= block.bytes


class _Region:
    """A run of operations that compute a checkpointed region again."""

    def __init__(self, before: int) -> None:
        self.before = self.after = before
        self.path: list[str] | None = None

    def visit(self, module: str, now: int) -> None:
        self.after = now
        parts = module.split(".")
        if self.path is None:
            self.path = parts
        elif module:
            same = [a == b for a, b in zip(self.path, parts, strict=False)]
            self.path = self.path[: [*same, False].index(False)]

    def result(self) -> Recomputed:
        return Recomputed(".".join(self.path or []), max(0, self.after - self.before))


def _free(timeline: weakref.ref[Timeline], key: int) -> None:
    owner = timeline()
    if owner is not None:
        owner.free(key)
