"""What a forward leaves alive beside saved tensors: results, what the graph holds in ways that no
hook sees (a selective checkpoint's cache, closures of hooks), and what Python holds.

Which of these a storage is shows when it goes: results are dropped first, then the graph. Neither
needs to know by what way it was held.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from petal_kernels.memory import graph
from petal_kernels.memory.modules import ModuleStack
from petal_kernels.memory.reasons import CHECKPOINT, HELD, why
from petal_kernels.memory.records import (
    Block,
    Saved,
    Sizes,
    plain_tensors,
    storage_key,
    tensors_in,
)
from petal_kernels.memory.timeline import Timeline


class Rest:
    """The blocks that live at the end of the forward and are nobody's yet.

    results  what the step returned, the objective among it
    module   its attributes are Python's: a recomputation may replace them
    regions  frames of checkpointed regions, for the name of what they hold
    """

    def __init__(
        self,
        timeline: Timeline,
        results: Iterable[Tensor],
        objective: Tensor,
        module: nn.Module | None,
        regions: Sequence[weakref.ref[Any]],
        stack: ModuleStack,
    ) -> None:
        for t in results:
            for part in plain_tensors(t):
                timeline.categorise(storage_key(part), "outputs")
        self._stack, self._timeline = stack, timeline
        loss, own = _keys([objective]), _keys(_attributes(module))
        self._returned: list[Block] = []  # by the model, in a tensor that is found
        self._open: list[Block] = []
        self._blocks: dict[int, int] = {}
        self._elsewhere: list[Block] = []
        for key, block in timeline.living().items():
            self._blocks[id(block)] = key
            if block.category == "outputs" and key not in loss:
                self._returned.append(block)
            elif block.category == "temporary":
                (self._elsewhere if key in own else self._open).append(block)
        self._outputs = [b for b in timeline.alive() if b.category == "outputs"]
        held = regions if self._open else ()
        self._regions = _keys(t for ref in held for t in graph.tensors_under(ref()))

    def outputs_dropped(self) -> None:
        """The results went, the graph is there: what went with them was theirs."""
        for block in self._open:
            if block.died is not None:
                block.category = "outputs"
                self._outputs.append(block)
        self._open = [b for b in self._open if b.died is None]
        self._open += [b for b in self._returned if b.died is None]

    def graph_dropped(self, sizes: Sizes) -> list[Saved]:
        """The graph went, too: what went with it was kept for backward."""
        if any(b.died is None for b in self._open):
            gc.collect()
        found = []
        for block in self._open:
            if block.died is not None:
                block.category = "saved for backward"
                found.append(self._record(block))
            elif block.category == "temporary":
                self._elsewhere.append(block)
        for block in self._elsewhere:
            block.category = "elsewhere"
        sizes.elsewhere = sum(b.bytes for b in self._elsewhere)
        sizes.outputs = sum(b.bytes for b in self._outputs if b.category == "outputs")
        return [record for record in found if record.bytes]

    def _record(self, block: Block) -> Saved:
        operation = CHECKPOINT if self._blocks[id(block)] in self._regions else HELD
        argument = "cache" if operation == CHECKPOINT else "other"
        return Saved(
            bytes=block.bytes,
            shape=block.shape,
            dtype=block.dtype,
            module=block.module,
            kind=self._stack.kinds.get(block.module, ""),
            role=self._stack.roles.get(block.module, ""),
            operation=operation,
            argument=argument,
            why=why(operation, argument),
            copy_of=block.copy_of,
            source=self._timeline.name_of(block.copy_of),
        )


def _keys(tensors: Iterable[Tensor]) -> set[int]:
    return {storage_key(part) for t in tensors for part in plain_tensors(t)}


def _attributes(module: nn.Module | None) -> Iterable[Tensor]:
    for each in [] if module is None else module.modules():
        for name, value in vars(each).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from tensors_in(value)
