"""The command: which model, what is asked, where the report goes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import inspect
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from petal_kernels import memory
from petal_kernels.memory import calibrate
from petal_kernels.memory.records import mib
from petal_kernels.memory.text import columns, report
from petal_kernels.tools import environment
from petal_kernels.tools.argument_types import device, listed, positive
from petal_kernels.tools.memory import compare, html, plot, whatif
from petal_kernels.tools.memory.presets import DEMO, METHODS, NAMES, PRESETS, Options, Step, prepare

_EPILOG = """examples:
  petal-kernels memory                                           the demo's model, a real batch
  petal-kernels memory --model instructblip-vicuna-7b --batch 8  7.9 G parameters, on any machine
  petal-kernels memory --model instructblip-vicuna-7b --what-if all --html memory.html
  petal-kernels memory --model instructblip-vicuna-7b --method peft-lora --part language_model
  petal-kernels memory --compare lora-qkv                        PEFT's LoRA and fused layers
  petal-kernels memory --script train.py:build --fail-above 4096 your own model, a budget

A script has a function (default: build) that returns (model, batch) or (model, batch, loss). If it
takes arguments named like options (batch, length, rank, checkpointing, attention, device), it gets
those that are given here, and --what-if changes them.

exit codes: 0; 1 over the budget of --fail-above; 2 wrong usage"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    args = parser.parse_args(arguments)
    command = shlex.join(["petal-kernels", "memory", *arguments])
    try:
        if args.compare:
            return _compare(args, command)
        return _profile(args, command)
    except _UsageError as error:
        parser.error(str(error))
    except (ValueError, ImportError, OSError) as error:
        if args.script:  # a fault in somebody's own code is found by its traceback
            raise
        parser.error(str(error))


class _UsageError(ValueError):
    """A mistake on the command line."""


def _parser() -> argparse.ArgumentParser:
    presets = "\n".join(
        f"  {name:<24}{preset.summary} ({', '.join(preset.methods)})"
        for name, preset in PRESETS.items()
    )
    parser = argparse.ArgumentParser(
        prog="petal-kernels memory",
        description="What a training step keeps for backward, per module, and what is alive when.",
        epilog=f"models:\n  {'demo':<24}the demo's small InstructBLIP, real pictures (petal)\n"
        f"{presets}\n\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", choices=NAMES, default="demo", metavar="NAME", help="see below")
    what.add_argument("--script", metavar="FILE[:FUNCTION]", help="your own model; see below")
    what.add_argument("--compare", choices=["lora-qkv"], help="ways to write one layer")
    parser.add_argument("--method", choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    for name, text in (
        ("batch", "samples"),
        ("length", "words of text per sample"),
        ("rank", "of the adapter"),
    ):
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=text)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the base")
    parser.add_argument("--attention", choices=["sdpa", "eager"])
    parser.add_argument("--checkpointing", action="store_const", const=True)
    parser.add_argument("--implementation", choices=["fused", "published"], help="of the adapter")
    parser.add_argument("--part", metavar="PATH", help="put the adapter on this submodule")
    parser.add_argument("--targets", metavar="REGEX", help="projections to adapt")
    parser.add_argument("--dropout", type=float, metavar="P", help="of the adapter")
    parser.add_argument(
        "--device", type=device, help="run on real tensors there (default: fake ones)"
    )
    parser.add_argument(
        "--what-if",
        type=listed(("all", *whatif.QUESTIONS)),
        default=(),
        metavar="LIST",
        help=f"run again with one change each: all, or some of {','.join(whatif.QUESTIONS)}",
    )
    parser.add_argument("--rows", type=positive, default=16, help="of the table (default: 16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="'-' for the terminal")
    parser.add_argument("--html", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE", help="the timeline")
    parser.add_argument(
        "--fail-above", type=float, metavar="MIB", help="exit code 1 if more is saved for backward"
    )
    return parser


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given."""
    names = [f.name for f in dataclasses.fields(Options)]
    return {name: v for name in names if (v := getattr(args, name)) is not None}


def _builder(args: argparse.Namespace) -> tuple[str, Options, Callable[[Options], Step], list[str]]:
    """Title, options, how to build a step with other options, and the questions that apply."""
    given = _given(args)
    questions = list(whatif.QUESTIONS if "all" in args.what_if else args.what_if)
    if args.script:
        build, known = _script(args.script, given)
        asked = [q for q in questions if {"eager": "attention"}.get(q, q) in known]
        return args.script, Options(**given), build, asked
    if args.model == "demo":
        options = Options(**{**DEMO, **given})
        if options.method != "petal" or options.device != "cpu" or options.dtype != "float32":
            raise _UsageError("--model demo: want method petal and float32 on the CPU")
        _refuse(args, "--model demo", ("length", "part", "targets"))
        asked = [q for q in questions if q != "length"]
        return _title("demo", options), options, lambda o: prepare("demo", o), asked
    preset = PRESETS[args.model]
    options = Options(**{"method": preset.methods[0], **preset.defaults, **given})
    if options.method not in preset.methods:
        raise _UsageError(
            f"--method: want one of {', '.join(preset.methods)} for {args.model}, "
            f"got {options.method}"
        )
    asked = [
        q for q in questions if q != "published" or options.method not in ("peft-lora", "full")
    ]
    return _title(args.model, options), options, lambda o: prepare(args.model, o), asked


def _refuse(args: argparse.Namespace, what: str, names: Sequence[str]) -> None:
    """Options that would go unheeded."""
    given = [name for name in names if getattr(args, name) not in (None, ())]
    if given:
        raise _UsageError(f"{what}: has no --{given[0].replace('_', '-')}")


def _title(name: str, options: Options) -> str:
    kind = f"real tensors on {options.device}" if options.device else "fake tensors"
    return f"{name}: {options.describe()}, {options.dtype}, {kind}"


def _script(text: str, given: dict[str, Any]) -> tuple[Callable[[Options], Step], set[str]]:
    """How to build the step of a user's function, and the options that it knows."""
    place, _, name = text.partition(":")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None or not Path(place).exists():
            raise _UsageError(f"--script: want a Python file, got {place!r}")
        module = importlib.util.module_from_spec(spec)
        # A script finds what lies beside it, as if it were run.
        sys.path.insert(0, str(Path(place).resolve().parent))
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(place)
    function = getattr(module, name or "build", None)
    if not callable(function):
        raise _UsageError(f"--script: want a function {name or 'build'}() in {place}, found none")
    parameters = inspect.signature(function).parameters
    known = {f.name for f in dataclasses.fields(Options)} & set(parameters)

    def build(options: Options) -> Step:
        before = Options(**given)
        changed = {k for k in known if k in given or getattr(options, k) != getattr(before, k)}
        result = function(**{k: getattr(options, k) for k in changed})
        if not isinstance(result, tuple) or len(result) not in (2, 3):
            raise _UsageError(f"--script: want (model, batch) or (model, batch, loss) from {text}")
        model, batch, *rest = result
        if any(p.is_meta for p in model.parameters()):
            model, batch = memory.fake_tensors(model, batch)
        return Step(model, batch, rest[0] if rest else None)

    return build, known


def _profile(args: argparse.Namespace, command: str) -> int:
    title, options, build, questions = _builder(args)
    quiet = args.json is not None and str(args.json) == "-"
    say: Callable[[str], None] = (lambda _: None) if quiet else print
    began = time.perf_counter()
    _wait(f"{title} ...", quiet)
    profile = whatif.run(build(options))
    spent = time.perf_counter() - began
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    say(f"{title}\n")
    say(report(profile, args.rows, width))
    _calibrate(args, profile, options, build, say)
    answers = [whatif.answer("as it is", profile, spent)]
    for each in whatif.ask(build, options, questions):
        answers.append(each)
        _wait(f"what if: {each.label}: {mib(each.saved)}", quiet)
    if len(answers) > 1:
        say("\nWhat if (each a run of its own)")
        say(columns(whatif.HEADERS, whatif.rows(answers), right=(1, 2, 3, 4, 5)))
    _write(args, command, title, profile, answers)
    say(f"\n{spent:.1f} s, this process at most {mib(_resident())}")
    if args.fail_above is not None and profile.saved_bytes > args.fail_above * 2**20:
        print(
            f"{mib(profile.saved_bytes)} saved for backward, more than the "
            f"{args.fail_above:g} MiB of --fail-above",
            file=sys.stderr,
        )
        return 1
    return 0


def _calibrate(
    args: argparse.Namespace,
    profile: memory.Profile,
    options: Options,
    build: Callable[[Options], Step],
    say: Callable[[str], None],
) -> None:
    """On CUDA: the allocator's figures beside this run's, and beside a run on fake tensors."""
    if not profile.device_bytes:
        return
    say("\nCUDA's allocator beside the profile of this run")
    for margin in calibrate.margins(profile):
        say(f"  {margin}")
    if not args.script:
        predicted = whatif.run(build(dataclasses.replace(options, device="")))
        say("and beside the same step on fake tensors")
        for margin in calibrate.margins(profile, predicted):
            say(f"  {margin}")


def _wait(text: str, quiet: bool) -> None:
    """A line that a terminal shows while a run takes its seconds."""
    if sys.stderr.isatty() and not quiet:
        print(f"\r\x1b[K{text}\r", end="", file=sys.stderr, flush=True)


def _resident() -> int:
    """Most memory that this process has had."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _write(
    args: argparse.Namespace,
    command: str,
    title: str,
    profile: memory.Profile,
    answers: Sequence[whatif.Answer],
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
        }
        _save(args.json, json.dumps(data, indent=1))
    if args.html is not None:
        _save(args.html, html.report(title, profile, answers, command, where))
    if args.png is not None:
        try:
            plot.timeline(profile, title, args.png)
        except ImportError as error:
            raise ImportError("--png: want matplotlib: pip install matplotlib") from error


def _save(path: Path, text: str) -> None:
    if str(path) == "-":
        print(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")


def _compare(args: argparse.Namespace, command: str) -> int:
    heeded = {"batch", "length", "rank", "dropout", "dtype"}
    others = [f.name for f in dataclasses.fields(Options) if f.name not in heeded]
    _refuse(args, "--compare", [*others, "what_if", "png", "fail_above"])
    layer = compare.Layer(
        **{k: v for k in ("batch", "length", "rank") if (v := getattr(args, k)) is not None},
        **({} if args.dropout is None else {"dropout": args.dropout}),
        **({} if args.dtype is None else {"dtype": getattr(torch, args.dtype)}),
    )
    kept = compare.compare(layer)
    dtype = str(layer.dtype).removeprefix("torch.")
    sizes = f"{layer.batch} x {layer.length} x {layer.width} {dtype}, r={layer.rank}"
    theirs = "PEFT's own layers" if compare.peft_installed() else "PEFT not installed: restated"
    title = f"LoRA on q, k and v of one layer, {sizes} ({theirs})"
    rows = [[k.label, mib(k.bytes), f"{k.times_x:.2f}x"] for k in kept]
    where = environment.describe(torch.get_num_threads())
    if str(args.json) != "-":
        print(f"{title}\n")
        print(columns(("form", "kept for backward", "of x's bytes"), rows, right=(1, 2)))
        print(
            "\nParameters are not counted; x is, once. Dropout keeps its mask as on CUDA, in bytes."
        )
    if args.json is not None:
        forms = [{"form": k.label, "bytes": k.bytes, "times_x": k.times_x} for k in kept]
        data = {"schema": 1, "title": title, "command": command, "environment": where}
        _save(args.json, json.dumps({**data, "forms": forms}, indent=1))
    if args.html is not None:
        _save(args.html, html.comparison(title, kept, command, where))
    return 0
