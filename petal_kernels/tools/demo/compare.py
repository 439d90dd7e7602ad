"""Fused and eager published layers side by side: the same curve, time per step, bytes kept for
backward.

Three copies of a model, measured in turns inside one run: `fused`, `published` (the layers as the
authors wrote them, in eager torch, with the same parameters) and `frozen` (no adapter; the gradient
still flows through the same layers). What a form costs above `frozen` is the adapter's own cost.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from petal_kernels import memory
from petal_kernels.tools.demo.train import Batch, Batches, Form, Trainer

# A wrong index or scale moves the loss by 1e-2 or more; see `curve_bound` for where the bound comes
# from.
_AMPLIFICATION = 16.0
_CONTROLS = 2


@dataclass(frozen=True)
class Comparison:
    """Figures of `compare`; losses with dropout off, times and bytes with dropout on."""

    steps: int
    fused_losses: list[float]
    published_losses: list[float]
    max_difference: float
    bound: float
    milliseconds: dict[str, float]
    saved_bytes: dict[str, int]
    trainable: int
    total: int

    @property
    def agrees(self) -> bool:
        return self.max_difference <= self.bound

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "agrees": self.agrees, "trainable_percent": self.trainable_percent}

    @property
    def verdict(self) -> str:
        """In words, what the curves show."""
        word = "coincide" if self.agrees else "DO NOT COINCIDE"
        return (
            f"{self.steps} steps from one seed, dropout off: they {word}; largest difference "
            f"{self.max_difference:.1e}, bound {self.bound:.1e}"
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Comparison:
        return cls(**{entry.name: values[entry.name] for entry in fields(cls)})

    @property
    def trainable_percent(self) -> float:
        return 100.0 * self.trainable / self.total


Tick = Callable[[int, int], None]


def compare(
    trainer_of: Callable[[str], Trainer], frozen: Form, steps: int, timed: int, tick: Tick
) -> Comparison:
    """Compares `trainer_of("fused")` with `trainer_of("published")`, and both with `frozen`;
    `tick(done, total)` is called after each step.
    """
    total = steps * (2 + _CONTROLS) + timed
    done = 0
    trainers = {"fused": trainer_of("fused")}
    for name in ("published", *(f"control {i}" for i in range(_CONTROLS))):
        trainers[name] = trainer_of("published")
    fused, published = trainers["fused"], trainers["published"]
    _share_parameters(trainers)
    generator = torch.Generator().manual_seed(fused.settings.seed)
    for i in range(_CONTROLS):
        _nudge(trainers[f"control {i}"].parameters, generator)
    # Evaluation mode: dropout off.
    for _ in range(steps):
        for trainer in trainers.values():
            trainer.step()
            done += 1
            tick(done, total)
    controls = [trainers[f"control {i}"].curve.losses for i in range(_CONTROLS)]
    forms = {"frozen": frozen, "published": published.form, "fused": fused.form}

    def timed_tick(count: int) -> None:
        tick(done + count, total)

    state = torch.get_rng_state()
    milliseconds = _times(forms, fused.batches, timed, timed_tick)
    saved = {name: saved_bytes(form, fused.batches[0]) for name, form in forms.items()}
    torch.set_rng_state(state)
    return Comparison(
        steps=steps,
        fused_losses=fused.curve.losses,
        published_losses=published.curve.losses,
        max_difference=largest_difference(fused.curve.losses, published.curve.losses),
        bound=curve_bound(published.curve.losses, controls),
        milliseconds=milliseconds,
        saved_bytes=saved,
        trainable=sum(p.numel() for p in fused.parameters),
        total=sum(p.numel() for p in frozen.model.parameters()),
    )


def largest_difference(one: list[float], other: list[float]) -> float:
    """Largest distance of two curves; a value that is not finite counts as infinitely far."""
    distances = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max((d if math.isfinite(d) else math.inf for d in distances), default=0.0)


def curve_bound(published: list[float], controls: list[list[float]]) -> float:
    """How far two right implementations may drift apart.

    The controls are the published form itself, started from parameters moved by one unit in the
    last place. Training amplifies that as it amplifies the different rounding of another order of
    operations, which happens anew at every step and in several products: hence a multiple, and a
    floor of as many roundings of the loss itself.
    """
    spread = max(largest_difference(published, control) for control in controls)
    floor = torch.finfo(torch.float32).eps * max(published)
    return _AMPLIFICATION * (spread + floor)


def _share_parameters(trainers: dict[str, Trainer]) -> None:
    """All forms start from the fused form's parameters: they have the same state dict."""
    state = trainers["fused"].attachment.state_dict()
    for name, trainer in trainers.items():
        if name != "fused":
            trainer.attachment.load_state_dict(state)


@torch.no_grad()
def _nudge(parameters: Sequence[Tensor], generator: torch.Generator) -> None:
    """Moves every value by one unit in the last place, up or down."""
    for parameter in parameters:
        up = torch.rand(parameter.shape, generator=generator) < 0.5
        towards = torch.where(up, torch.inf, -torch.inf)
        # From zero the next number is a denormal, no disturbance at all: leave zeros alone.
        moved = torch.nextafter(parameter, towards.to(parameter.dtype))
        parameter.copy_(torch.where(parameter == 0, parameter, moved))


def _times(
    forms: dict[str, Form], batches: Batches, count: int, tick: Callable[[int], None]
) -> dict[str, float]:
    """Median milliseconds of forward + backward in training mode, the forms taking turns on the
    same batches.
    """
    spent: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form.model.train()
        form.loss(batches[0]).backward()
    for i in range(count):
        batch = batches[i]
        for name, form in forms.items():
            form.model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            form.loss(batch).backward()
            spent[name].append(1000.0 * (time.perf_counter() - began))
        tick(i + 1)
    for form in forms.values():
        form.model.zero_grad(set_to_none=True)
        form.model.eval()
    return {name: statistics.median(values) for name, values in spent.items() if values}


def saved_bytes(form: Form, batch: Batch) -> int:
    """Bytes that the graph of one training step keeps: each storage once, parameters left out."""
    form.model.train()
    found = memory.profile(form.loss, (batch,), module=form.model, backward=False)
    form.model.eval()
    return found.saved_bytes
