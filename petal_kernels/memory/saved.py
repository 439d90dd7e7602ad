"""Records what autograd keeps while a forward runs, and asks the graph afterwards who keeps it.

A saved-tensor hook sees every tensor that an operation keeps, but not which operation: it hands
autograd a ticket instead of the tensor, and the walk over the finished graph finds the tickets.
What is dropped before the forward ends takes its ticket with it and is not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from petal_kernels.memory.modules import ModuleStack
from petal_kernels.memory.reasons import CHECKPOINT, why
from petal_kernels.memory.records import (
    Keeper,
    Saved,
    plain_tensors,
    storage_bytes,
    storage_key,
)
from petal_kernels.memory.timeline import Timeline

_FRAME: Any = getattr(checkpoint, "_CheckpointFrame", None)
_RAW = "_raw_saved_"
_REENTRANT = "CheckpointFunctionBackward"


class _Ticket:
    """Stands in autograd's graph for one kept tensor."""

    __slots__ = ("__weakref__", "argument", "behind", "module", "operation", "tensor", "useful")

    def __init__(self, tensor: Tensor, module: str) -> None:
        # Detached: an operation's own result would hold its graph, and the graph it.
        self.tensor = tensor.detach()
        self.module = module
        self.operation = self.argument = ""
        self.useful = True
        self.behind: list[Any] = []  # nodes that the inputs of its checkpointed region come from


class SavedTensors:
    """Context of a forward; `records` afterwards, while the graph is alive."""

    def __init__(self, stack: ModuleStack) -> None:
        self._stack = stack
        self.checkpointed = False  # some region is to be computed again; known after `records`
        self._tickets: list[weakref.ref[_Ticket]] = []
        self._save_inputs: Any = None
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> SavedTensors:
        self._save_inputs = getattr(_FRAME, "save_inputs", None)
        if self._save_inputs is not None:
            _FRAME.save_inputs = lambda frame, *inputs: self._checkpoint(frame, inputs)
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()
        if self._save_inputs is not None:
            _FRAME.save_inputs = self._save_inputs

    def _pack(self, tensor: Tensor) -> _Ticket:
        ticket = _Ticket(tensor, self._stack.current)
        self._tickets.append(weakref.ref(ticket))
        return ticket

    def _checkpoint(self, frame: Any, inputs: tuple[Any, ...]) -> None:
        """A region saves its inputs past our hooks, through which they would come back as other
        objects: layers that know an input by its identity would compute another way again.
        """
        top = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if top is None or top[0] != self._pack:  # a region inside another saves nothing itself
            self._save_inputs(frame, *inputs)
            return
        self._hooks.__exit__()
        try:
            self._save_inputs(frame, *inputs)
        finally:
            self._hooks.__enter__()
        given = [t for t in inputs if isinstance(t, Tensor)]
        tickets = [self._pack(t) for t in given]
        for ticket in tickets:
            ticket.operation, ticket.argument = CHECKPOINT, "input"
            ticket.behind = [t.grad_fn for t in given if t.grad_fn is not None]
        frame.tickets_of_profile = tickets  # they die when the region's promise does

    def records(
        self,
        outputs: Iterable[Tensor],
        parameters: dict[int, str],
        batch: set[int],
        trained: set[int],
        timeline: Timeline,
    ) -> tuple[list[Saved], dict[str, int]]:
        """Every kept storage once, in the order of keeping, and kept parameters and buffers apart.

        `parameters` and `batch` hold the storages of the model's own tensors (with names) and of
        the batch, `trained` the identities of the tensors that get a gradient.
        """
        reaches = _walk(outputs, trained)
        self.checkpointed = _label(reaches)
        kept: dict[int, list[tuple[_Ticket, Tensor]]] = {}
        for reference in self._tickets:
            ticket = reference()
            if ticket is None:
                continue
            if self.checkpointed and not ticket.operation:
                # torch before 2.13: a region's own node hangs on nothing but the closure that will
                # run it again.
                ticket.operation, ticket.argument = CHECKPOINT, "input"
            if ticket.behind and self._stack.roles.get(ticket.module) != "trainable":
                ticket.useful = any(reaches.get(node, True) for node in ticket.behind)
            for part in plain_tensors(ticket.tensor):
                kept.setdefault(storage_key(part), []).append((ticket, part))
        found: list[Saved] = []
        own: dict[str, int] = {}
        for key, keepers in kept.items():
            size = storage_bytes(keepers[0][1])
            if key in parameters:
                own[parameters[key]] = size
            elif size:
                found.append(self._record(key, size, keepers, key in batch, timeline))
        return found, own

    def _record(
        self,
        key: int,
        size: int,
        keepers: Sequence[tuple[_Ticket, Tensor]],
        of_batch: bool,
        timeline: Timeline,
    ) -> Saved:
        (first, tensor), rest = keepers[0], [ticket for ticket, _ in keepers[1:]]
        timeline.categorise(key, "saved for backward")
        block = timeline.block(key)
        source = None if block is None else block.copy_of
        others = dict.fromkeys(Keeper(t.module, t.operation, t.argument) for t in rest)
        return Saved(
            bytes=size,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            module=first.module,
            kind=self._stack.kinds.get(first.module, ""),
            role=self._stack.roles.get(first.module, ""),
            operation=first.operation,
            argument=first.argument,
            why=why(first.operation, first.argument),
            useful=any(ticket.useful for ticket, _ in keepers),
            of_batch=of_batch,
            also=tuple(others),
            copy_of=source,
            source=timeline.name_of(source),
        )


def _unpack(ticket: _Ticket) -> Tensor:
    return ticket.tensor


_ATTRIBUTES: dict[type, tuple[str, ...]] = {}


def _held(node: Any) -> Iterable[tuple[str, Any]]:
    """What a node holds for its tensors, each with its argument's name; nothing is unpacked, which
    would start a checkpointed region's recomputation.
    """
    kind = type(node)
    if kind not in _ATTRIBUTES:
        _ATTRIBUTES[kind] = tuple(name for name in dir(node) if name.startswith(_RAW))
    for name in _ATTRIBUTES[kind]:
        raw = getattr(node, name)
        label = name.removeprefix(_RAW)
        several = isinstance(raw, (tuple, list))
        for i, each in enumerate(raw if several else [raw]):
            yield (f"tensor {i}" if label == "tensors" else label), each.data


def _label(reaches: dict[Any, bool]) -> bool:
    """Tells every ticket its operation, and whether a trained tensor lies behind that operation.
    True if parts of the graph hold a checkpoint's promise instead of a tensor.
    """
    promised = False
    for node, useful in reaches.items():
        name = node.name()
        promised = promised or name == _REENTRANT
        for argument, held in _held(node):
            if isinstance(held, _Ticket):
                held.operation, held.argument, held.useful = name, argument, useful
            else:
                promised = promised or type(held).__module__ == checkpoint.__name__
    return promised


def _walk(outputs: Iterable[Tensor], trained: set[int]) -> dict[Any, bool]:
    """Every node behind the outputs, and whether a trained tensor lies behind it."""
    reaches: dict[Any, bool] = {}
    for output in outputs:
        if output.grad_fn is not None:
            _reach(output.grad_fn, trained, reaches)
    return reaches


def _reach(root: Any, trained: set[int], reaches: dict[Any, bool]) -> None:
    """Depth first without recursion: a graph is deeper than Python's stack."""
    pending: list[tuple[Any, bool]] = [(root, False)]
    while pending:
        node, ready = pending.pop()
        if node in reaches:
            continue
        below = [child for child, _ in node.next_functions if child is not None]
        if ready:
            variable = getattr(node, "variable", None)
            # A reentrant checkpoint hides its parameters.
            own = id(variable) in trained or node.name() == _REENTRANT
            reaches[node] = own or any(reaches.get(child, False) for child in below)
        else:
            pending.append((node, True))
            pending += [(child, False) for child in below if child not in reaches]
