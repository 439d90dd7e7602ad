"""The command: which model, what is asked, where the report goes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from petal_kernels import memory
from petal_kernels._runtime.columns import columns
from petal_kernels.memory import calibrate
from petal_kernels.memory.optimizer import Settings, settings_of
from petal_kernels.memory.records import mib
from petal_kernels.memory.text import report
from petal_kernels.tools import charts, environment, exits
from petal_kernels.tools.exits import Refusal
from petal_kernels.tools.memory import (
    arguments,
    compare,
    compare_layer,
    html,
    planner,
    plot,
    whatif,
)
from petal_kernels.tools.memory.options import Options
from petal_kernels.tools.memory.subjects import Subject, aside, given_options, refuse
from petal_kernels.tools.memory.subjects import subject as subject_of

_ROWS = 16


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. A mistake of the user's is argparse's error; what a
    script raises is its own.
    """
    words = list(sys.argv[1:] if words is None else words)
    parser = arguments.parser()
    args = parser.parse_args(words)
    command = shlex.join(["petal-kernels", "memory", *words])
    with exits.refusing(parser, Refusal):
        _check_files(args)
        alone = bool(args.compare) and args.compare[0] in arguments.LAYERS
        if args.reserve is not None and (alone or not (args.compare or args.gpu)):
            raise Refusal("--reserve: want it with --gpu or --compare METHODS")
        if alone:
            return _compare(args, command)
        if args.compare or args.gpu:
            return planner.main(args, command, _save)
        return _profile(args, command)


def _check_files(args: argparse.Namespace) -> None:
    """What would fail after the work fails before it."""
    files = [args.json, args.html, args.png]
    named = [path.resolve() for path in files if path is not None and str(path) != "-"]
    if len(set(named)) < len(named):
        raise Refusal(f"want a file for each report, got {named[0]} twice")
    for name, path in (("--html", args.html), ("--png", args.png)):
        if path is not None and str(path) == "-":
            raise Refusal(f"{name}: want a file, got '-'")
        if path is not None:
            charts.need(name)
    exits.writable(*files)


def _questions(args: argparse.Namespace, subject: Subject) -> tuple[list[str], dict[str, str]]:
    """The questions to ask and, of "all", those that cannot be asked with the reason. Raises
    Refusal for one that was asked by name.
    """
    everything = "all" in args.what_if
    asked: list[str] = []
    left: dict[str, str] = {}
    for name in whatif.QUESTIONS if everything else dict.fromkeys(args.what_if):
        reason = whatif.why_not(name, subject.options, subject.heeded, subject.who)
        if not reason:
            asked.append(name)
        elif everything:
            left[name] = reason
        else:
            raise Refusal(f"--what-if {name}: {reason}")
    return asked, left


@contextlib.contextmanager
def _refusals(every: bool) -> Iterator[None]:
    """What a step raises and is a user's mistake: `every` complaint of a preset that is built from
    his options; what the profiler itself says of what it is given; too large a model. Anything else
    is a fault in somebody's code, a script's or ours, and is found by its traceback.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Refusal(f"{error}; without --device it runs on fake tensors") from error
    except (TypeError, ValueError, ImportError, OSError) as error:
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        where = "" if last is None else last.tb_frame.f_globals.get("__name__", "")
        if not (every or where.startswith("petal_kernels.memory.")):
            raise
        raise Refusal(f"{error}") from error


def _measure(args: argparse.Namespace, subject: Subject, said: list[str]) -> whatif.Measure:
    """How to run the step with other options; `said` gets what the first one's batch is."""

    def measure(options: Options) -> memory.Profile:
        with _refusals(every=not args.script), aside(args):
            step = subject.build(options)
        if not said:
            said.extend(step.said)
        with _refusals(every=False), aside(args):
            return whatif.run(step, args.accumulate)

    return measure


def _profile(args: argparse.Namespace, command: str) -> int:
    subject = subject_of(args)
    questions, left = _questions(args, subject)
    optimizer = args.optimizer or settings_of("adamw")
    quiet = str(args.json) == "-"
    say: Callable[[str], None] = (lambda _: None) if quiet else print
    began = time.perf_counter()
    _wait(f"{subject.title} ...", quiet)

    said: list[str] = []
    measure = _measure(args, subject, said)
    plain = measure(subject.options)
    profile = plain.with_optimizer(optimizer) if args.optimizer else plain
    spent = time.perf_counter() - began
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    title = "\n".join([subject.title, *said])
    say(f"{title}\n")
    say(report(profile, args.rows or _ROWS, width))
    _calibrate(None if args.script else subject.options, plain, measure, say)
    answers = [whatif.answer("as it is", plain, optimizer, spent)]
    for each in whatif.ask(measure, subject.options, questions, optimizer):
        answers.append(each)
        _wait(f"what if: {each.label}: {mib(each.saved)}", quiet)
    if len(answers) > 1:
        say("\nWhat if (each a run of its own)")
        say(columns(whatif.headers(optimizer), whatif.rows(answers), right=(1, 2, 3, 4, 5)))
    for name, reason in left.items():
        say(f"  not asked: {name}: {reason}")
    _write(args, command, title, profile, answers, left, optimizer)
    say(f"\n{spent:.1f} s, this process at most {mib(environment.most_resident())}")
    if args.fail_above is not None and profile.saved_bytes > args.fail_above * 2**20:
        print(
            f"{mib(profile.saved_bytes)} saved for backward, more than the "
            f"{args.fail_above:g} MiB of --fail-above",
            file=sys.stderr,
        )
        return exits.BROKEN_BOUND
    return exits.FINE


def _calibrate(
    options: Options | None,
    profile: memory.Profile,
    measure: whatif.Measure,
    say: Callable[[str], None],
) -> None:
    """On CUDA: the allocator's figures beside this run's, and beside a run on fake tensors where
    there are options to build it with.
    """
    if not profile.device_bytes:
        return
    say("\nCUDA's allocator beside the profile of this run")
    for margin in calibrate.margins(profile):
        say(f"  {margin}")
    if options is not None:
        predicted = measure(dataclasses.replace(options, device=""))
        say("and beside the same step on fake tensors")
        for margin in calibrate.margins(profile, predicted):
            say(f"  {margin}")


def _wait(text: str, quiet: bool) -> None:
    """A line that a terminal shows while a run takes its seconds."""
    if sys.stderr.isatty() and not quiet:
        print(f"\r\x1b[K{text}\r", end="", file=sys.stderr, flush=True)


def _write(
    args: argparse.Namespace,
    command: str,
    title: str,
    profile: memory.Profile,
    answers: Sequence[whatif.Answer],
    left: dict[str, str],
    optimizer: Settings,
) -> None:
    """The files that are asked for."""
    where = environment.describe(torch.get_num_threads())
    if args.json is not None:
        data = {
            "title": title,
            "command": command,
            "environment": where,
            **profile.to_dict(),
            "what_if": [dataclasses.asdict(a) for a in answers[1:]],
            "what_if_optimizer": str(optimizer),
            "not_asked": left,
        }
        _save(args.json, json.dumps(data, indent=1))
    if args.html is not None:
        _save(args.html, html.report(title, profile, answers, command, where, optimizer))
    if args.png is not None:
        plot.timeline(profile, title).savefig(args.png, dpi=120, format="png")


def _save(path: Path, text: str) -> None:
    if str(path) == "-":
        print(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")


def _compare(args: argparse.Namespace, command: str) -> int:
    if args.script or args.config or args.model != "demo" or args.gpu:
        raise Refusal(f"--compare {args.compare[0]}: has a model of its own and no --gpu")
    layer_alone = args.compare[0] == "lora-layer"
    heeded = {"batch", "length", "rank", "dropout", "dtype"}
    heeded |= {"targets"} if layer_alone else set()
    others = [f.name for f in dataclasses.fields(Options) if f.name not in heeded]
    more = ("optimizer", "accumulate", "what_if", "rows", "png", "fail_above")
    refuse(args, "--compare", [*others, *more])
    sizes: dict[str, Any] = {
        k: v for k, v in given_options(args).items() if k not in ("targets", "dtype")
    }
    sizes |= {} if args.dtype is None else {"dtype": getattr(torch, args.dtype)}
    if layer_alone:
        layer = compare_layer.Sizes(**sizes)
        targets = compare_layer.TARGETS if args.targets is None else (args.targets,)
        with _refusals(every=True):
            kept = list(compare_layer.compare(layer, targets))
        title, table = compare_layer.title(layer), compare_layer.table(kept)
    else:
        attention = compare.Layer(**sizes)
        kept = compare.compare(attention)
        title, table = compare.title(attention), compare.table(kept)
    where = environment.describe(torch.get_num_threads())
    if str(args.json) != "-":
        print(f"{title}\n\n{table}")
    if args.json is not None:
        forms = [
            {"form": k.label, "targets": k.targets, "bytes": k.bytes, "times_x": k.times_x}
            for k in kept
        ]
        data = {"schema": 1, "title": title, "command": command, "environment": where}
        _save(args.json, json.dumps({**data, "forms": forms}, indent=1))
    if args.html is not None:
        _save(args.html, html.comparison(title, kept, command, where))
    return 0
