"""The command line of `petal-kernels bench`, and the request that it makes."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from petal_kernels._runtime.backends import NAMES as BACKENDS
from petal_kernels.tools.argument_types import device, factor, listed, positive, positives
from petal_kernels.tools.bench import layer, model, op, packages
from petal_kernels.tools.bench.model_builders import SIZES
from petal_kernels.tools.bench.request import AXES, DTYPES, Request
from petal_kernels.tools.bench.scenarios import MODES

BASELINES = ("published", "eager", "compile", "base", "grouped_mm", *packages.PACKAGES)
TARGETS = {"op": op.names, "layer": layer.names, "model": model.names}
OUTPUTS = ("--json", "--csv", "--html")
# What `plans` and `overhead` would not heed.
OF_TABLES = ("shape", "against", "backend", "sweep", "values", "fail_below", "csv", "html")


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """Of the command line."""
    targets = "\n".join(f"  {kind:<7}{', '.join(names())}" for kind, names in TARGETS.items())
    built = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=f"names:\n{targets}\n  plans, overhead: no names\n\nexamples:\n"
        f"  {program} op gated_bottleneck --html\n"
        f"  {program} layer lora_linear --against published,peft --sweep rank\n"
        f"  {program} model bart --size small --mode full\n"
        f"  {program} compare before.json after.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    built.add_argument("what", choices=[*TARGETS, "plans", "overhead", "compare"])
    built.add_argument("names", nargs="*", help="which, default all")
    add = built.add_argument
    add("--shape", default="", metavar="TEXT", help="only the shapes with TEXT in their names")
    add("--size", choices=list(SIZES), help="of the models, default full")
    add("--against", type=listed(BASELINES), default=(), metavar="NAMES",
        help=f"baselines, default all that can run: {', '.join(BASELINES)}")  # fmt: skip
    add("--backend", type=listed(("auto", *BACKENDS)), default=(), metavar="NAMES",
        help="ours, default all that can run (layers and models: what auto takes)")  # fmt: skip
    add("--mode", type=listed(("all", *MODES)), default=("train", "full"), metavar="MODES",
        help=f"some of {', '.join(MODES)} or all; default train,full")  # fmt: skip
    add("--sweep", choices=AXES, help="vary one size of each shape")
    add("--values", type=positives, default=(), metavar="N,N",
        help="of the sweep, default 1/4 to 2 times the shape's own")  # fmt: skip
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=positive, default=torch.get_num_threads())
    add("--rounds", type=positive, default=20, help="samples of each time, at least 4")
    add("--quick", action="store_true", help="few small shapes and no torch.compile: does it run?")
    add("--no-gate", action="store_true", help="skip the tests; rows are checked all the same")
    add("--fail-below", type=factor, metavar="X",
        help="exit with 1 where auto's choice, or any backend that is named, is below X times the "
        "published speed")  # fmt: skip
    for name in OUTPUTS:
        add(name, type=Path, nargs="?", const=Path(), metavar="FILE",
            help=f"write {name[2:].upper()} (default bench-WHAT-NAMES.{name[2:]})")  # fmt: skip
    return built


def request(args: argparse.Namespace) -> Request:
    """What was asked for; RequestError where it makes no sense."""
    return Request(
        dtype=DTYPES[args.dtype],
        device=torch.device(args.device),
        against=args.against,
        backends=args.backend,
        modes=MODES if "all" in args.mode else args.mode,
        rounds=args.rounds,
        threads=args.threads,
        sweep=args.sweep,
        values=args.values,
        shape=args.shape,
        quick=args.quick,
    )


def command(program: str, arguments: Sequence[str]) -> str:
    """What was typed, to be typed again; where the results went is left out."""
    kept: list[str] = []
    skip = False
    for i, word in enumerate(arguments):
        if skip or word.split("=")[0] in OUTPUTS:
            after = arguments[i + 1] if i + 1 < len(arguments) else "-"
            skip = not skip and "=" not in word and not after.startswith("-")
            continue
        kept.append(word)
    return shlex.join([*program.split(), *kept])
