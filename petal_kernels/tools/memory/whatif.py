"""What if: the same step with one choice changed, each a run of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from petal_kernels import memory
from petal_kernels.memory.records import mib
from petal_kernels.tools.memory.presets import Options, Step

Build = Callable[[Options], Step]
QUESTIONS: dict[str, tuple[str, Callable[[Options], Options]]] = {
    "batch": ("batch x 2", lambda o: replace(o, batch=2 * o.batch)),
    "length": ("length x 2", lambda o: replace(o, length=2 * o.length)),
    "rank": ("rank x 2", lambda o: replace(o, rank=2 * o.rank)),
    "checkpointing": ("gradient checkpointing", lambda o: replace(o, checkpointing=True)),
    "eager": ("eager attention", lambda o: replace(o, attention="eager")),
    "published": ("published layers", lambda o: replace(o, implementation="published")),
}


@dataclass(frozen=True)
class Answer:
    """One run: bytes saved for backward, at the peak, and with Adam's moments beside it."""

    label: str
    saved: int
    peak: int
    with_adam: int
    seconds: float


def run(step: Step) -> memory.Profile:
    """The profile of one step."""
    return memory.profile(step.model, step.batch, loss=step.loss, module=step.module)


def answer(label: str, profile: memory.Profile, seconds: float) -> Answer:
    """The figures of a run."""
    return Answer(label, profile.saved_bytes, profile.peak_bytes, profile.with_adam(), seconds)


def ask(build: Build, options: Options, questions: Sequence[str]) -> Iterator[Answer]:
    """An answer to each question that changes anything; the step as it is comes from the caller."""
    for name in questions:
        label, change = QUESTIONS[name]
        changed = change(options)
        if changed == options:
            continue
        began = time.perf_counter()
        profile = run(build(changed))
        yield answer(label, profile, time.perf_counter() - began)


HEADERS = ("what if", "saved", "", "peak", "", "with Adam")


def rows(answers: Sequence[Answer]) -> list[list[str]]:
    """The table's cells: figures, and the difference to the first answer."""
    first = answers[0]

    def difference(value: int, of: int) -> str:
        return "" if value == of else f"{'+' if value > of else '-'}{mib(abs(value - of))}"

    return [
        [
            a.label,
            mib(a.saved),
            difference(a.saved, first.saved),
            mib(a.peak),
            difference(a.peak, first.peak),
            mib(a.with_adam),
        ]
        for a in answers
    ]
