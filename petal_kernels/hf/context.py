"""What a call depends on: it belongs to the thread or task that calls, never to the model.

`with` blocks (`disabled`, `vision`, `domains`, `context`) are entries of a context variable: a
thread or an asyncio task sees its own. An entry leaves by itself, so that blocks may nest, overlap
and end in any order.

What a forward does is one synchronous piece of a thread: the stack that runs (`Running`) and the
layer that runs (`Frame`) are kept per thread, and so are outputs that wait for their linear
(`Waiting`). A layer's call reads everything once and binds it, so
that a recompute in the backward, in whatever thread, sees what its own forward saw (`parts.py`).

A graph that is being compiled cannot read context variables: there a thread's blocks count, tasks
not told apart.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from petal_kernels.hf.tokens import Domains, Tokens

if TYPE_CHECKING:
    from petal_kernels.hf.methods.lora_parts import Waiting
    from petal_kernels.hf.parts import StackPart

OFF = "off"
SWITCHED = (
    "switch: another adapter is active than in the forward that checkpointing runs again; call "
    "backward before switch. Checkpointing that is not transformers' own "
    "(gradient_checkpointing_enable) runs again without saying which adapter ran, and is refused "
    "once a model has been switched"
)


class Owner(Protocol):
    """Whose a block is: a method."""

    switched: bool  # whether another adapter of the model was active before, or is now


@dataclass(frozen=True)
class Given:
    """What the blocks around a call say."""

    on: bool = True
    vision: Tensor | None = None
    domains: Domains | None = None
    features: Tensor | None = None


_NOTHING = Given()


class Block:
    """One `with` block that is open: whose it is, and what it says."""

    def __init__(self, owner: object, kind: str, value: Any) -> None:
        self.owner, self.kind, self.value = owner, kind, value
        self.open = True


_BLOCKS: ContextVar[tuple[Block, ...]] = ContextVar("petal_blocks", default=())


class _Thread(threading.local):
    """What runs in a thread now."""

    def __init__(self) -> None:
        self.blocks: tuple[Block, ...] = ()
        self.running: Running | None = None
        self.frame: Frame | None = None
        self.waiting: Waiting | None = None


THREAD = _Thread()


@contextlib.contextmanager
def inside(owner: object, kind: str, value: Any = None) -> Iterator[None]:
    """A block of `owner`, for what this thread or task calls until it ends."""
    block = Block(owner, kind, value)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        # Without those that ended elsewhere: a generator collected in another thread.
        _BLOCKS.set((*(b for b in _BLOCKS.get() if b.open), block))
    THREAD.blocks = (*(b for b in THREAD.blocks if b.open), block)
    try:
        yield
    finally:
        block.open = False  # for whoever copied the context meanwhile
        if not compiling:
            _BLOCKS.set(tuple(b for b in _BLOCKS.get() if b is not block))
        THREAD.blocks = tuple(b for b in THREAD.blocks if b is not block)


def in_backward() -> bool:
    """Whether this thread is inside a backward, and what runs is run again."""
    if torch.compiler.is_compiling():
        return False
    return int(torch._C._current_graph_task_id()) != -1


def given(owner: Owner | None) -> Given:
    """What the blocks of `owner` say here and now: off where any does, else what the last one of a
    kind says; `pk.fuse` has none."""
    if torch.compiler.is_compiling():  # a graph that looks at nothing that switching changes
        blocks = THREAD.blocks
    else:
        if owner is not None and owner.switched and in_backward():
            raise RuntimeError(SWITCHED)
        blocks = _BLOCKS.get()
    if not blocks:
        return _NOTHING
    own = [b for b in blocks if b.owner is owner and b.open]
    if not own:
        return _NOTHING
    values = {b.kind: b.value for b in own if b.kind != OFF}
    return Given(on=all(b.kind != OFF for b in own), **values)


def now(owner: Owner | None) -> Given:
    """The same for what runs now: inside a layer's run what its call has bound."""
    frame = THREAD.frame
    while frame is not None:
        if frame.layer.method is owner:
            return frame.call.given
        frame = frame.outer
    return given(owner)


class Call:
    """What one forward of a stack, or of a layer outside one, depends on."""

    def __init__(self, says: Given, tokens: Tokens | None = None, shared: Any = None) -> None:
        self.given = says
        self.tokens = Tokens(domains=says.domains) if tokens is None else tokens
        self.shared = shared  # products that the layers share, with their graph
        self.grad = torch.is_grad_enabled()
        self.reentrant: set[int] = set()  # layers that ran without gradients first


class Running:
    """A stack's forward that runs in this thread."""

    def __init__(self, stack: StackPart, call: Call, outer: Running | None) -> None:
        self.stack, self.call, self.outer = stack, call, outer


class Bound(Protocol):
    """Whose run a frame is: a part of a method."""

    method: Any


class Frame:
    """One run of one layer: what its parts see and leave for one another.

    `shared` is the call's, or None in a recompute that must not touch its graph; `source` what the
    shared products were computed from, as this run was given it.
    """

    def __init__(
        self, layer: Bound, call: Call, shared: Any, source: Tensor | None, outer: Frame | None
    ) -> None:
        self.layer, self.call, self.shared, self.source = layer, call, shared, source
        self.outer = outer
        self.alone = False  # of a block outside its layer, whose norm will not be called
