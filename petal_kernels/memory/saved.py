"""Records what autograd keeps while a forward runs, and asks the graph afterwards who keeps it.

A saved-tensor hook sees every tensor that an operation keeps, but not which operation: it hands
autograd a ticket instead of the tensor, and the walk over the finished graph finds the tickets.
What is dropped before the forward ends takes its ticket with it and is not counted. What the graph
holds past this hook (what another hook made of a tensor, attributes of a ctx) the walk finds too;
`rest` has what neither sees.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from petal_kernels.memory import graph
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


class Ticket:
    """Stands in autograd's graph for one kept tensor."""

    __slots__ = ("__weakref__", "argument", "behind", "module", "operation", "tensor", "useful")

    def __init__(self, tensor: Tensor, module: str | None) -> None:
        self.tensor = tensor
        self.module = module  # None: not known, for no hook of ours was asked
        self.operation = self.argument = ""
        self.useful = True
        self.behind: list[Any] = []  # nodes that the inputs of its checkpointed region come from


class SavedTensors:
    """Context of a forward; `records` afterwards, while the graph is alive. Without `hooks`, for
    functions that do not run under any, a record's module is where its tensor was made.
    """

    def __init__(self, stack: ModuleStack, hooks: bool = True) -> None:
        self._stack = stack
        self.checkpointed = False  # some region is to be computed again; known after `records`
        self.compiled = False  # some node is compiled code's; likewise
        self.before = ""  # a node that was there before, and holds tensors; likewise
        self.nodes: dict[Any, bool] = {}  # of the graph, and whether something trained is behind
        self.regions: list[weakref.ref[Any]] = []  # checkpoints' frames
        self._tickets: list[weakref.ref[Ticket]] = []
        self._first = 0  # number of the step's first node
        self._hooks: Any = contextlib.nullcontext()
        if hooks:
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> SavedTensors:
        self._first = torch._C._autograd._get_sequence_nr()
        _Checkpoints.enter()
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__(None, None, None)
        _Checkpoints.leave()

    def _pack(self, tensor: Tensor) -> Ticket:
        # Detached: an operation's own result would hold its graph, and the graph it.
        ticket = Ticket(tensor.detach(), self._stack.current)
        self._tickets.append(weakref.ref(ticket))
        return ticket

    def begin_region(self, frame: Any, inputs: tuple[Any, ...]) -> None:
        """A region saves its inputs past our hooks, through which they would come back as other
        objects: layers that know an input by its identity would compute another way again.
        """
        self._hooks.__exit__(None, None, None)
        try:
            _Checkpoints.original(frame, *inputs)
        finally:
            self._hooks.__enter__()
        given = [t for t in inputs if isinstance(t, Tensor)]
        tickets = [self._pack(t) for t in given]
        for ticket in tickets:
            ticket.operation, ticket.argument = CHECKPOINT, "input"
            ticket.behind = [t.grad_fn for t in given if t.grad_fn is not None]
        frame.tickets_of_profile = tickets  # they die when the region's promise does
        self.regions.append(weakref.ref(frame))

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
        self.nodes = graph.walk(outputs, trained)
        others = self._label()
        kept: dict[int, list[tuple[Ticket, Tensor]]] = {}
        for ticket in [*self._living(), *others]:
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

    def _living(self) -> Iterable[Ticket]:
        """The tickets whose tensors are kept."""
        for reference in self._tickets:
            ticket = reference()
            if ticket is None:
                continue
            if self.checkpointed and not ticket.operation:
                # torch before 2.13: a region's own node hangs on nothing but the closure that will
                # run it again.
                ticket.operation, ticket.argument = CHECKPOINT, "input"
            if ticket.behind and self._stack.roles.get(ticket.module or "") != "trainable":
                ticket.useful = any(self.nodes.get(node, True) for node in ticket.behind)
            yield ticket

    def _label(self) -> list[Ticket]:
        """Tells every ticket its operation, and whether a trained tensor lies behind it. Returns
        new tickets for what the graph holds past our hook.
        """
        others: list[Ticket] = []
        for node, useful in self.nodes.items():
            name = node.name()
            if node._sequence_nr() < self._first:
                self.before = name if any(graph.saved(node)) else self.before
                continue
            self.checkpointed = self.checkpointed or name == graph.REENTRANT
            self.compiled = self.compiled or name == graph.COMPILED
            held: list[tuple[str, Tensor]] = list(graph.attributes(node))
            for argument, value in graph.saved(node):
                if isinstance(value, Ticket):
                    value.operation, value.argument, value.useful = name, argument, useful
                elif type(value).__module__ == checkpoint.__name__:
                    self.checkpointed = True
                elif not _is_number(value):
                    held += [(argument, t) for t in graph.tensors_under(value)]
            for argument, t in held:
                ticket = Ticket(t, None)
                ticket.operation, ticket.argument, ticket.useful = name, argument, useful
                others.append(ticket)
        return others

    def _record(
        self,
        key: int,
        size: int,
        keepers: Sequence[tuple[Ticket, Tensor]],
        of_batch: bool,
        timeline: Timeline,
    ) -> Saved:
        (first, tensor), rest = keepers[0], [ticket for ticket, _ in keepers[1:]]
        block = timeline.block(key)
        timeline.categorise(key, "saved for backward")
        source = None if block is None else block.copy_of
        module = first.module
        if module is None:  # where it was made is the best that is known
            module = "" if block is None or of_batch else block.module
        others = dict.fromkeys(Keeper(t.module or "", t.operation, t.argument) for t in rest)
        return Saved(
            bytes=size,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            module=module,
            kind=self._stack.kinds.get(module, ""),
            role=self._stack.roles.get(module, ""),
            operation=first.operation,
            argument=first.argument,
            why=why(first.operation, first.argument),
            useful=any(ticket.useful for ticket, _ in keepers),
            of_batch=of_batch,
            also=tuple(others),
            copy_of=source,
            source=timeline.name_of(source),
        )


class _Checkpoints:
    """The one place where a checkpointed region's saving of inputs is listened to, whoever else
    profiles meanwhile: whose it is says the hook on top of the thread that runs it.
    """

    original: Any = None
    _users = 0
    _lock = threading.Lock()

    @classmethod
    def enter(cls) -> None:
        with cls._lock:
            cls._users += 1
            if cls._users == 1 and _FRAME is not None and hasattr(_FRAME, "save_inputs"):
                cls.original = _FRAME.save_inputs
                _FRAME.save_inputs = _save_inputs

    @classmethod
    def leave(cls) -> None:
        with cls._lock:
            cls._users -= 1
            if cls._users == 0 and cls.original is not None:
                _FRAME.save_inputs, cls.original = cls.original, None


def _save_inputs(frame: Any, *inputs: Any) -> None:
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
    owner = None if top is None else getattr(top[0], "__self__", None)
    if isinstance(owner, SavedTensors):
        owner.begin_region(frame, inputs)
    else:  # a region inside another saves nothing itself
        _Checkpoints.original(frame, *inputs)


def _is_number(value: Any) -> bool:
    """A factor written in Python, which autograd keeps as a tensor without asking hooks."""
    return isinstance(value, Tensor) and value.dim() == 0


def _unpack(ticket: Ticket) -> Tensor:
    return ticket.tensor
