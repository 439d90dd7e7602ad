"""What a step needs of a device, by what it is for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from petal_kernels import memory
from petal_kernels.hf.linears import output_heads
from petal_kernels.memory.allocator import needed_bytes
from petal_kernels.memory.optimizer import STATES, Settings
from petal_kernels.memory.records import Block

FROZEN, TRAINED = "frozen weights", "trained weights"
GRADIENTS, KEPT, LOSS = "gradients", "kept for backward", "logits and loss"
OTHERS, BATCH = "temporaries", "batch and buffers"
ROUNDING, CONTEXT = "allocator rounding", "CUDA context, workspaces"
PARTS = (FROZEN, TRAINED, GRADIENTS, STATES, KEPT, LOSS, OTHERS, BATCH, ROUNDING, CONTEXT)
_OF_STEP = {"gradients": GRADIENTS, "optimizer states": STATES, "buffers": BATCH, "batch": BATCH}


@dataclass(frozen=True)
class Budget:
    """Bytes at the peak of a step with its optimizer's, by `PARTS`.

    phase  where the peak is
    unit   weights that an engine which shards them has whole at once: two of the layers (one
           computes, the next arrives), and what is in no layer
    """

    parts: dict[str, int]
    phase: str
    unit: int = 0
    saved: int = 0  # kept for backward at the end of the forward

    @property
    def need(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**dataclasses.asdict(self), "need": self.need}


def budget(
    profile: memory.Profile, optimizer: Settings, reserve: int, model: nn.Module | None
) -> Budget:
    """Of a profile without an optimizer; `reserve` bytes are the context's."""
    step = profile.with_optimizer(optimizer)
    words = vocabularies(model)
    parts: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    for block in step.blocks:
        if block.lives_at(step.peak_step):
            parts[_part(block, step.trained, words)] += block.bytes
    parts[ROUNDING] = max(0, needed_bytes(step.blocks) - step.peak_bytes)
    parts[CONTEXT] = reserve
    return Budget(dict(parts), step.peak_phase, gathered(model), profile.saved_bytes)


def _part(block: Block, trained: frozenset[str], words: frozenset[int]) -> str:
    if block.category == "parameters":
        return TRAINED if block.module in trained else FROZEN
    if block.category in _OF_STEP:
        return _OF_STEP[block.category]
    if block.shape and block.shape[-1] in words:
        return LOSS
    return KEPT if block.category == "saved for backward" else OTHERS


def vocabularies(model: nn.Module | None) -> frozenset[int]:
    """The widths of its output heads: what has one as its last dimension is made of logits."""
    found = [] if model is None else output_heads(model)
    return frozenset(
        int(w.shape[0]) for h in found if (w := getattr(h, "weight", None)) is not None
    )


def gathered(model: nn.Module | None) -> int:
    """Bytes of weights that are whole at once where all are sharded by layers."""
    if model is None:
        return 0
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    layers = [m for m in model.modules() if type(m).__name__ in kinds]
    inside = {id(p): p for layer in layers for p in layer.parameters()}
    root = {id(p): p for p in model.parameters() if id(p) not in inside}
    largest = max((_bytes(layer) for layer in layers), default=0)
    return 2 * largest + sum(p.numel() * p.itemsize for p in root.values())


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in module.parameters())


@dataclass(frozen=True)
class Sharding:
    """An engine over several GPUs, each with the batch that was asked for: what it divides."""

    name: str
    divides: tuple[str, ...]
    gathers: bool = False


ZERO2 = Sharding("ZeRO-2", (GRADIENTS, STATES))
FSDP = Sharding("ZeRO-3 / FSDP", (FROZEN, TRAINED, GRADIENTS, STATES), gathers=True)


def sharded(whole: Budget, how: Sharding, count: int) -> Budget:
    """The need of each of `count` GPUs."""
    parts = dict(whole.parts)
    for name in how.divides:
        parts[name] = -(-parts[name] // count)
    if how.gathers:
        parts[OTHERS] += whole.unit
    return dataclasses.replace(whole, parts=parts)
