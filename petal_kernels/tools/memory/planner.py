"""`--gpu` and `--compare METHODS`: the needs of a step, and whether they fit."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from petal_kernels import memory
from petal_kernels.memory.optimizer import Settings, settings_of
from petal_kernels.memory.records import mib
from petal_kernels.tools import environment, exits
from petal_kernels.tools.exits import Refusal
from petal_kernels.tools.memory import fit_text, gpus, towers, whatif
from petal_kernels.tools.memory.budget import Budget, budget
from petal_kernels.tools.memory.fit import Planner, Verdict
from petal_kernels.tools.memory.options import Options
from petal_kernels.tools.memory.presets import HEEDED, Step
from petal_kernels.tools.memory.subjects import Subject, aside, given_options, refuse, subject

_NOT_ASKED = ("accumulate", "what_if", "rows", "png", "fail_above", "device")


@dataclasses.dataclass
class Column:
    """One method: its options, its need, whether it fits where a GPU is named, what its frozen
    tower keeps, and why it is not there where it cannot be attached."""

    method: str
    title: str
    options: Options
    budget: Budget | None = None
    verdict: Verdict | None = None
    tower: towers.Tower | None = None
    said: list[str] = dataclasses.field(default_factory=list)
    why_not: str = ""


class Needs:
    """Budgets of a subject's steps; of the first options and the last the profile stays, so that
    another optimizer needs no run."""

    def __init__(self, of: Subject, reserve: int) -> None:
        self._of, self._reserve = of, reserve
        self._kept: dict[Options, tuple[memory.Profile, Step]] = {}

    def run(self, options: Options) -> tuple[memory.Profile, Step]:
        """The profile of a step with these options."""
        if options not in self._kept:
            step = self._of.build(options)
            found = whatif.run(step), step
            first = dict([*self._kept.items()][:1])
            self._kept = first | {options: found}
        return self._kept[options]

    def __call__(self, options: Options, optimizer: Settings) -> Budget:
        profile, step = self.run(options)
        return budget(profile, optimizer, self._reserve, model_of(step))


def model_of(step: Step) -> nn.Module | None:
    """The module of a step."""
    if step.module is not None:
        return step.module
    return step.model if isinstance(step.model, nn.Module) else None


def main(args: argparse.Namespace, command: str, save: Callable[[Path, str], None]) -> int:
    """Runs it; the exit code is 1 where a GPU is named and the step does not fit."""
    refuse(args, "--gpu" if args.gpu else "--compare", _NOT_ASKED)
    methods = args.compare or (None,)
    if args.compare:
        if args.script or (args.config is None and args.model == "demo"):
            raise Refusal("--compare METHODS: want --config or a --model that has several methods")
        if args.method:
            raise Refusal("--compare METHODS: has no --method")
        unheeded = set(given_options(args)) - set().union(*(HEEDED[m] for m in methods if m))
        refuse(args, f"--compare {','.join(args.compare)}", sorted(unheeded - _OF_CONFIG))
    optimizer = args.optimizer or settings_of("adamw")
    began = time.perf_counter()
    with aside(args):
        columns = [_column(args, optimizer, each) for each in methods]
    if all(c.budget is None for c in columns):
        raise Refusal("; ".join(f"{c.method}: {c.why_not}" for c in columns))
    quiet = str(args.json) == "-"
    text = fit_text.report(columns, optimizer)
    if not quiet:
        print(text)
        spent = time.perf_counter() - began
        print(f"\n{spent:.1f} s, this process at most {mib(environment.most_resident())}")
    where = environment.describe(torch.get_num_threads())
    if args.json is not None:
        document = fit_text.document(columns, optimizer, command, where)
        save(args.json, json.dumps(document, indent=1))
    if args.html is not None:
        save(args.html, fit_text.page_of(columns, optimizer, command, where))
    verdicts = [c.verdict for c in columns if c.verdict is not None]
    broken = bool(verdicts) and not any(v.fits for v in verdicts)
    return exits.BROKEN_BOUND if broken else exits.FINE


_OF_CONFIG = {"images", "image_size"}


def _column(args: argparse.Namespace, optimizer: Settings, method: str | None) -> Column:
    found = subject(args, method)
    column = Column(found.options.method or "the step", found.title, found.options)
    reserve = gpus.RESERVE if args.reserve is None else args.reserve
    needs = Needs(found, int(reserve * gpus.GIB))
    say, tell = _progress(args, column.method)
    say("as it is ...")
    try:
        column.budget = needs(found.options, optimizer)
    except (ValueError, TypeError) as error:
        if args.script:  # a fault of its own is found by its traceback
            raise
        if method is None:
            raise Refusal(str(error)) from error
        column.why_not = str(error)
        return column
    profile, step = needs.run(found.options)
    column.said = step.said
    column.tower = towers.tower(profile, model_of(step))
    if args.gpu is not None:
        planner = Planner(needs, args.gpu, optimizer, found.heeded, say, tell)
        planner.known(found.options, column.budget)
        column.verdict = planner.verdict(found.options)
    say("")
    return column


Say = Callable[[str], None]


def _progress(args: argparse.Namespace, method: str) -> tuple[Say, Say]:
    """What is said on stderr while runs take their seconds: what runs now, one line on a terminal;
    and what was found, lines that stay."""

    def say(text: str) -> None:
        if str(args.json) == "-":
            return
        if sys.stderr.isatty():
            end = f"{method}: {text}\r" if text else ""
            print(f"\r\x1b[K{end}", end="", file=sys.stderr, flush=True)
        elif text:
            print(f"{method}: {text}", file=sys.stderr, flush=True)

    def tell(text: str) -> None:
        say("")
        if str(args.json) != "-":
            print(f"{method}: {text}", file=sys.stderr, flush=True)

    return say, tell
