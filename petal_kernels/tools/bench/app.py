"""`petal-kernels bench`: operators, layers and whole training steps against their eager forms.

Correctness comes first: the operators' tests where there is a checkout, then every row against
fp64, before the timing and again after it on other inputs; no speed-up is printed on red. Times are
medians of interleaved cold-cache rounds. `bench compare A.json B.json` compares two runs.
Exit code: 0; 1 below --fail-below; 2 where something is wrong, cannot run or was asked for wrongly;
130 interrupted: what was measured until then is written, and marked as partial.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from petal_kernels._runtime.backends import BackendUnavailable, default_backend
from petal_kernels.tools import environment, exits
from petal_kernels.tools.bench import (
    arguments,
    ceilings,
    compared,
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
from petal_kernels.tools.bench.judge import judge
from petal_kernels.tools.bench.measure import measure
from petal_kernels.tools.bench.outputs import Outputs
from petal_kernels.tools.bench.request import Request, RequestError
from petal_kernels.tools.bench.results import Report
from petal_kernels.tools.bench.scenarios import Scenario
from petal_kernels.tools.bench.verdict import verdict


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
        "model": lambda: model.scenarios(names, request, args.size or "full"),
    }
    makers = list(found[args.what]())
    if not makers and request.skipped:
        raise RequestError("; ".join(request.skipped.values()))
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
    report.absent |= packages.absent(names, request.device, request.against)
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
        for table in measure(scenario, request, report.ceilings, progress.phase):
            if any(row.suspect for row in table.rows.values()):
                # Before a row is accused: the roof may have been measured in a bad moment.
                again = ceilings.measure(request.device, request.dtype, request.quick)
                report.ceilings = report.ceilings | again
            judge(table, report.ceilings)
            report.tables.append(table)
            progress.clear()
            print(console.text(table), flush=True)
        progress.finished()
        if "base" in scenario.providers and args.what == "model":
            medians = {k: r.timing.median for k, r in table.rows.items()}
            added = ", ".join(f"{k} {100 * v:.1f} %" for k, v in model.tax(medians).items())
            print(f"  added to the frozen step: {added}")


def _names(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """The targets, after everything that is asked for in vain has been refused."""
    if args.what == "compare":
        parser.error("compare: want it first, bench compare A.json B.json")
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
    unheeded = list(arguments.OF_TABLES) if args.what in ("plans", "overhead") else []
    unheeded += [] if args.what == "model" else ["size"]
    for option in unheeded:
        if getattr(args, option):
            parser.error(f"{args.what}: has no --{option.replace('_', '-')}")
    return args.names or known


def main(words: Sequence[str] | None = None, program: str = "petal-kernels bench") -> int:
    """Parse, gate, measure, print, write; the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    parser = arguments.parser(program, __doc__ or "")
    if words[:1] == ["compare"]:
        return compared.main(words[1:], program)
    args = parser.parse_intermixed_args(words)
    names = _names(args, parser)
    torch.set_num_threads(args.threads)
    with exits.refusing(parser, ValueError):
        default_backend()
        request = arguments.request(args)
        makers = _makers(args, names, request)
    if request.device.index is not None:
        torch.cuda.set_device(request.device)  # kernels are launched on the current one
    stem = "-".join(("bench", args.what, *(names if args.names else ())))
    outputs = Outputs.of({o[2:]: getattr(args, o[2:]) for o in arguments.OUTPUTS}, stem)
    _gate(args, names if args.what == "op" else op.names())
    report = Report(
        environment.describe(args.threads, request.device),
        arguments.command(program, words),
        args.dtype,
        args.device,
        args.sweep,
    )
    report.absent = dict(request.skipped)
    results: list[dict[str, Any]] = []
    try:
        if args.what in ("plans", "overhead"):
            bench = {"plans": plans.bench, "overhead": overhead.bench}[args.what]
            for result in bench(request):  # one by one: an interrupt leaves those before it
                results.append(result)
        else:
            _compare(args, makers, names, request, report)
    except BaseException as error:
        refused = isinstance(error, (RequestError, BackendUnavailable))
        report.partial = _ended_by(error)
        if report.tables or results:  # hours of measuring are not lost by what ended them
            outputs.write(_contents(args, report, results))
            if not isinstance(error, BrokenPipeError):  # the reader has left; that is no news
                said = f"\nstopped ({report.partial}): what was measured until here counts"
                print(said, file=sys.stderr)
        elif refused:
            parser.error(str(error))
        if isinstance(error, KeyboardInterrupt) and (report.tables or results):
            return exits.INTERRUPTED
        if refused:
            return exits.REFUSED
        raise
    print()
    if not outputs.write(_contents(args, report, results)):
        return exits.REFUSED
    return verdict(report, args.fail_below, bool(args.backend)) if makers else exits.FINE


def _ended_by(error: BaseException) -> str:
    """In a few words."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    known = isinstance(error, (RequestError, BackendUnavailable))
    return str(error) if known else f"{type(error).__name__}: {error}"


def _contents(
    args: argparse.Namespace, report: Report, results: list[dict[str, Any]]
) -> dict[str, Callable[[], str]]:
    """How each file's text is made."""
    if args.what in ("plans", "overhead"):
        return {"json": lambda: report.as_json(results)}
    return {"json": report.as_json, "csv": report.as_csv, "html": lambda: html.render(report)}
