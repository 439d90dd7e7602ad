"""`petal-kernels bench`: operators, layers and whole training steps against their eager forms.

Correctness comes first: the operators' tests where there is a checkout, then every row against
fp64; no speed-up is printed on red. Times are medians of interleaved cold-cache rounds.
Exit code: 0; 1 below --fail-below; 2 where something is wrong or was asked for wrongly.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from petal_kernels._runtime.backends import default_backend
from petal_kernels.tools import environment
from petal_kernels.tools.bench import (
    arguments,
    ceilings,
    console,
    correctness,
    html,
    layer,
    model,
    op,
    overhead,
    packages,
    plans,
)
from petal_kernels.tools.bench.measure import measure
from petal_kernels.tools.bench.request import Request, RequestError
from petal_kernels.tools.bench.results import Report
from petal_kernels.tools.bench.scenarios import Scenario
from petal_kernels.tools.colours import RED, painted


def _gate(args: argparse.Namespace, operators: Sequence[str]) -> None:
    if args.no_gate:
        return
    print(f"correctness first: {', '.join(operators)} ...", flush=True)
    said = correctness.tests(operators)
    if said is None:
        said = "no checkout with tests here: every row below is checked against fp64 instead"
    print(said, flush=True)


def _makers(
    args: argparse.Namespace, names: Sequence[str], request: Request
) -> list[Callable[[], Scenario]]:
    if args.what in ("plans", "overhead"):
        return []
    found = {
        "op": lambda: op.scenarios(names, request),
        "layer": lambda: layer.scenarios(names, request),
        "model": lambda: model.scenarios(names, request, args.size),
    }
    makers = list(found[args.what]())
    if not makers:
        raise RequestError(f"shape: want a part of a shape's name, got {args.shape!r}")
    return makers


def _compare(
    args: argparse.Namespace,
    makers: Sequence[Callable[[], Scenario]],
    names: Sequence[str],
    request: Request,
    report: Report,
) -> None:
    """Measure every scenario, printing each table when it is there."""
    report.absent = packages.absent(names, request.device, request.against)
    report.ceilings = ceilings.measure(request.device, request.dtype, request.quick)
    print(console.legend(report))
    for name, why in report.absent.items():
        print(f"{name}: {why}")
    progress = console.Progress(len(makers), len(request.modes))
    for make in makers:
        scenario = make()
        missing = [
            b for b in request.against if b not in scenario.providers and b not in report.absent
        ]
        if missing:
            scenario.notes.append(f"has no form {', '.join(missing)}")
        progress.scenario(scenario.name)
        tables = measure(scenario, request, report.ceilings, progress.phase)
        progress.finished()
        report.tables += tables
        for table in tables:
            print(console.text(table), flush=True)
        if "base" in scenario.providers and args.what == "model":
            medians = {k: r.timing.median for k, r in tables[-1].rows.items()}
            added = ", ".join(f"{k} {100 * v:.1f} %" for k, v in model.tax(medians).items())
            print(f"  added to the frozen step: {added}")


def _verdict(report: Report, fail_below: float | None) -> int:
    """The exit code, with the reasons for it on stderr."""
    rows = [(t, label, row) for t in report.tables for label, row in t.rows.items()]
    wrong = [(t, label, row) for t, label, row in rows if row.failed]
    for table, label, row in wrong:
        what = "computes something else" if row.errors and row.errors.wrong else "is imprecise"
        said = f"{table.scenario}, {table.mode}: {label} {what}, error ratio {row.errors}"
        print(painted(said, RED, sys.stderr), file=sys.stderr)
    if wrong:
        return 2
    slow = [
        (t, label, row)
        for t, label, row in rows
        if fail_below and row.chosen and row.speedup is not None and row.speedup < fail_below
    ]
    for table, label, row in slow:
        said = f"{table.scenario}, {table.mode}: {label} {row.speedup:.2f}x < {fail_below}x"
        print(painted(said, RED, sys.stderr), file=sys.stderr)
    return 1 if slow else 0


def _write(args: argparse.Namespace, names: Sequence[str], suffix: str, content: str) -> None:
    given: Path | None = getattr(args, suffix)
    if given is None:
        return
    stem = "-".join(("bench", args.what, *(names if args.names else ())))
    path = Path(f"{stem}.{suffix}") if given == Path() else given
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    print(f"written {path}")


def _names(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """The targets, after everything that is asked for in vain has been refused."""
    known = arguments.TARGETS[args.what]() if args.what in arguments.TARGETS else []
    unknown = [n for n in args.names if n not in known]
    if unknown:
        want = f"want some of {', '.join(known)}" if known else "want none"
        parser.error(f"names: {want}, got {', '.join(unknown)}")
    for option in arguments.OUTPUTS:
        given = str(getattr(args, option[2:]))
        if given in known:  # its file may be left out, so it takes the word that follows
            parser.error(f"{option}: want a file, got the name {given}: put names first")
    if args.what == "model" and importlib.util.find_spec("transformers") is None:
        parser.error("model: needs transformers: pip install 'petal-kernels[hf]'")
    if args.what in ("plans", "overhead"):
        unheeded = [name for name in arguments.OF_TABLES if getattr(args, name)]
        if unheeded:
            parser.error(f"{args.what}: has no --{unheeded[0].replace('_', '-')}")
    return args.names or known


def main(words: Sequence[str] | None = None, program: str = "petal-kernels bench") -> int:
    """Parse, gate, measure, print, write; the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    parser = arguments.parser(program, __doc__ or "")
    args = parser.parse_args(words)
    names = _names(args, parser)
    torch.set_num_threads(args.threads)
    try:
        request = arguments.request(args)
        makers = _makers(args, names, request)
        default_backend()
    except ValueError as error:
        parser.error(str(error))
    _gate(args, names if args.what == "op" else op.names())
    report = Report(
        environment.describe(args.threads),
        arguments.command(program, words),
        args.dtype,
        args.device,
        args.sweep,
    )
    if args.what in ("plans", "overhead"):
        results = {"plans": plans.bench, "overhead": overhead.bench}[args.what](request)
        found = {"environment": report.environment, "command": report.command, "results": results}
        _write(args, names, "json", json.dumps(found, indent=1) + "\n")
        return 0
    stopped = 0
    try:
        _compare(args, makers, names, request, report)
    except KeyboardInterrupt:
        stopped = 130
        print("\nstopped: what was measured until here counts", file=sys.stderr)
    except (RequestError, RuntimeError) as error:
        named = "cannot run here" in str(error)  # a backend, by an option or PETAL_BACKEND
        if not (named or isinstance(error, RequestError)):
            raise
        if not report.tables:
            parser.error(str(error))
        stopped = 2
        print(f"\n{error}\nstopped: what was measured until here counts", file=sys.stderr)
    print()
    _write(args, names, "json", report.as_json())
    _write(args, names, "csv", report.as_csv())
    if args.html is not None:
        _write(args, names, "html", html.render(report))
    return stopped or _verdict(report, args.fail_below)
