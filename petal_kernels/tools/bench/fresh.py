"""Values that no call has seen: what a form that replays an answer cannot know.

The inputs of a scenario are rolled in place before every timed call, outside the clock. So a form
that keeps an answer, by the inputs' addresses, shapes, versions or contents, either computes it
again in the clock or is found to be wrong when its answer is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from petal_kernels.tools.bench.timing import Step


def _rolled(t: Tensor, by: int) -> Tensor:
    """The same values in other places: rows change places and stay whole, so that gates still sum
    to one; of whole numbers (words) and of a single row the columns do."""
    if t.dim() < 2 or not t.is_floating_point() or t.numel() == t.shape[-1]:
        return t.roll(by, -1) if t.dim() else t
    return t.reshape(-1, t.shape[-1]).roll(by, 0).view(t.shape)


class Fresh:
    """Tensors whose values can be rolled on; `turn` says how often they have been."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        found = {t.data_ptr(): t for t in tensors if t.numel() > 1}
        self.tensors: Sequence[Tensor] = list(found.values())
        self.turn = 0

    def go_to(self, turn: int) -> None:
        """The values of one turn; 0 are those at the beginning."""
        with torch.no_grad():
            for t in self.tensors:
                t.copy_(_rolled(t.detach(), turn - self.turn))
        self.turn = turn

    def before(self, step: Step) -> Step:
        """The step on values of its own at every call."""

        def prepare() -> Any:
            self.go_to(self.turn + 1)
            return step.prepare()

        return Step(step.run, prepare, step.calls)


def _flat(result: object) -> list[Tensor]:
    """The tensors of a result but single numbers: two losses may be equal."""
    several = result if isinstance(result, Sequence) else [result]
    return [t for t in several if isinstance(t, Tensor) and t.numel() > 1]


def replays(step: Step, fresh: Fresh) -> bool:
    """Whether a step gives one answer, bit for bit, on two sets of inputs."""
    answers = []
    for turn in (0, 1):
        fresh.go_to(turn)
        answers.append([t.detach().clone() for t in _flat(step.run(step.prepare()))])
    first, second = answers
    same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    return bool(same) and all(same)
