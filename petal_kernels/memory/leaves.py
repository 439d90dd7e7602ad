"""The leaves that a forward reads: parameters that nobody named, and what gets a gradient."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from petal_kernels.memory.records import plain_tensors, storage_key
from petal_kernels.memory.timeline import Timeline


class Leaves(TorchDispatchMode):
    """While entered, notes the leaves among the operators' arguments."""

    def __init__(self, module: nn.Module | None, known: set[int], timeline: Timeline) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters: dict[str, Tensor] = {}  # such as no module holds that was given
        self.gathered: dict[str, Tensor] = {}  # whole ones in the place of the module's shards
        self._module = module
        self._known = known
        self._timeline = timeline
        self._seen: dict[int, weakref.ref[Tensor]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs as it would without this mode, in every thread."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, Tensor):
                self._meet(value)
            elif isinstance(value, (tuple, list)):
                for each in value:
                    if isinstance(each, Tensor):
                        self._meet(each)
        return func(*args, **(kwargs or {}))

    def _meet(self, t: Tensor) -> None:
        if not (t.requires_grad or isinstance(t, nn.Parameter)) or not t.is_leaf:
            return
        seen = self._seen.get(id(t))
        if seen is not None and seen() is t:
            return
        self._seen[id(t)] = weakref.ref(t)
        if isinstance(t, nn.Parameter):
            self._add(t)

    def _add(self, parameter: Tensor) -> None:
        """A parameter that was not there before the step, in the module or anywhere: it stays."""
        parts = [p for p in plain_tensors(parameter) if storage_key(p) not in self._known]
        if not parts:
            return
        own = [] if self._module is None else self._module.parameters()
        if any(parameter is each for each in own):  # as it is now, in the middle of the step
            found, name = self.gathered, f"gathered parameter {len(self.gathered)}"
        else:
            found, name = self.parameters, f"parameter of no given module {len(self.parameters)}"
        found[name] = parameter
        for part in parts:
            self._known.add(storage_key(part))
            self._timeline.add(part, "parameters", name)
            self._timeline.categorise(storage_key(part), "parameters")

    def trained(self, nodes: Iterable[Any]) -> list[Tensor]:
        """Every leaf that a backward may give a gradient: those met, and those of the graph."""
        seen = [t for each in self._seen.values() if (t := each()) is not None]
        met = [t for t in seen if t.requires_grad and t.is_leaf]  # views become results later
        ends = [t for node in nodes if (t := getattr(node, "variable", None)) is not None]
        return list({id(t): t for t in [*met, *ends]}.values())


@contextlib.contextmanager
def without_gradients(leaves: list[Tensor], but: Iterable[Tensor]) -> Iterator[None]:
    """Leaves that the caller holds have afterwards the gradients that they have now; those of
    `but` are somebody else's care.
    """
    others = {id(t) for t in but}
    own = [(t, t.grad) for t in leaves if id(t) not in others]
    try:
        for t, _ in own:
            t.grad = None
        yield
    finally:
        for t, grad in own:
            t.grad = grad


@contextlib.contextmanager
def buffers_put_back(model: nn.Module | None, largest: int) -> Iterator[list[str]]:
    """Buffers have afterwards the values, and are the objects, that they are now: statistics of
    batch norms, counters, codebooks. Yields a list that holds in the end the names of those that a
    step changed and that are larger than `largest` bytes, which is not copied.
    """
    changed: list[str] = []
    before: list[tuple[str, nn.Module, str, Tensor | None, Tensor | None, int]] = []
    for path, module in [] if model is None else model.named_modules():
        for name, value in module._buffers.items():
            copied = value is not None and _small(value, largest)
            copy = value.detach().clone() if copied and value is not None else None
            version = -1 if value is None or value.is_inference() else value._version
            before.append((f"{path}.{name}".lstrip("."), module, name, value, copy, version))
    try:
        yield changed
    finally:
        for label, module, name, value, copy, version in before:
            module._buffers[name] = value
            if value is None or value.is_inference():
                continue
            # Some kernels move statistics without a count of it: what is copied is compared.
            if copy is not None and not torch.equal(copy, value):
                with torch.no_grad():
                    value.copy_(copy)
            elif copy is None and value._version != version:
                changed.append(label)


def versions(tensors: dict[str, Tensor]) -> dict[str, int]:
    """How often each was written to, to see afterwards whether a step did."""
    return {name: t._version for name, t in tensors.items() if not t.is_inference()}


def _small(t: Tensor, largest: int) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    plain = type(t) is Tensor or isinstance(t, nn.Buffer)
    return plain and not isinstance(t, FakeTensor) and not t.is_meta and t.nbytes <= largest
