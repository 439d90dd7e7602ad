"""What if: the same step with one choice changed, each a run of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from petal_kernels import memory
from petal_kernels.memory.optimizer import Settings
from petal_kernels.memory.records import mib
from petal_kernels.tools.memory.lora_forms import installed
from petal_kernels.tools.memory.options import Options
from petal_kernels.tools.memory.presets import Step

Measure = Callable[[Options], memory.Profile]


@dataclass(frozen=True)
class Question:
    """The option that it changes, its label, what it changes it to (None doubles it); the one
    method that it is asked of, and the package that its answer needs."""

    option: str
    label: str
    to: str | bool | None
    method: str = ""
    needs: str = ""


QUESTIONS: dict[str, Question] = {
    "batch": Question("batch", "batch x 2", None),
    "length": Question("length", "length x 2", None),
    "rank": Question("rank", "rank x 2", None),
    "checkpointing": Question("checkpointing", "gradient checkpointing", True),
    "eager": Question("attention", "eager attention", "eager"),
    "published": Question("implementation", "published layers", "published"),
    "recompute-mlp": Question("recompute_mlp", "MLPs recomputed", True, "lora"),
    "peft": Question("method", "PEFT's LoRA", "peft-lora", "lora", "peft"),
}


@dataclass(frozen=True)
class Answer:
    """One run: bytes saved for backward, at the peak of forward and backward, and at the peak with
    an optimizer's states and step.
    """

    label: str
    saved: int
    peak: int
    with_optimizer: int
    seconds: float


def why_not(question: str, options: Options, heeded: Collection[str], subject: str) -> str:
    """Why a question cannot be asked of a step with these options, or nothing."""
    asked = QUESTIONS[question]
    value = getattr(options, asked.option)
    if asked.option not in heeded:
        return f"{subject} has no {asked.option}"
    if asked.method and options.method != asked.method:
        return f"it is asked of method {asked.method}, {subject} has {options.method}"
    if asked.needs and not installed(asked.needs):
        return f"want {asked.needs}, which is missing: pip install {asked.needs}"
    no_number = isinstance(value, bool) or not isinstance(value, int) or value < 1
    if asked.to is None and no_number:
        return f"{subject} has {asked.option}={value!r}, no number to double: give --{asked.option}"
    same = asked.to is not None and value == asked.to
    return f"{asked.option} is {value} already" if same else ""


def changed(question: str, options: Options) -> Options:
    """The options with a question's change."""
    asked = QUESTIONS[question]
    value: Any = 2 * getattr(options, asked.option) if asked.to is None else asked.to
    return replace(options, **{asked.option: value})


def run(step: Step, accumulate: bool | None = None) -> memory.Profile:
    """The profile of one step."""
    return memory.profile(
        step.model, step.batch, loss=step.loss, module=step.module, accumulate=accumulate
    )


def answer(label: str, profile: memory.Profile, optimizer: Settings, seconds: float) -> Answer:
    """The figures of a run."""
    peak = profile.with_optimizer(optimizer).peak_bytes
    return Answer(label, profile.saved_bytes, profile.peak_bytes, peak, seconds)


def ask(
    measure: Measure, options: Options, questions: Sequence[str], optimizer: Settings
) -> Iterator[Answer]:
    """An answer to each question; the step as it is comes from the caller."""
    for name in questions:
        began = time.perf_counter()
        profile = measure(changed(name, options))
        yield answer(QUESTIONS[name].label, profile, optimizer, time.perf_counter() - began)


def headers(optimizer: Settings) -> tuple[str, ...]:
    """Of the table."""
    return ("what if", "saved", "", "peak", "", f"with {optimizer}")


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
            mib(a.with_optimizer),
        ]
        for a in answers
    ]
