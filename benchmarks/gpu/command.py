"""The GPU suite: ``python -m benchmarks.gpu --minutes 25 --out DIR``.

Runs what only a GPU can show, in stages of falling value, within the minutes given. Every result is
on disk before the next case begins: the same command again goes on where it was stopped, or killed,
as does any run whose DIR holds the results.jsonl of an earlier one.
``--dry-run`` rehearses every stage on the CPU with tiny shapes. Exit code 1 when a check failed, 2
on wrong usage and where there is no GPU, 130 when interrupted. Needs no network and no test runner.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import summary
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.pool import Pool
from benchmarks.gpu.stages import STAGES, preflight
from benchmarks.gpu.suite import Case, Suite
from petal_kernels.tools import environment, exits
from petal_kernels.tools.argument_types import minutes, positive
from petal_kernels.tools.doctor import facts

_HELP = (__doc__ or "").replace("``", "")
_MOST_WORKERS = 12
_FIRST = "preflight"  # runs in every run, whatever an earlier one has found
_QUIET_SECONDS = 1.0  # between two lines about cases that passed
_MODULE = "benchmarks.gpu.stages"


def commit(given: str | None) -> str:
    """The commit asked for, the checkout's, or the one the compiled kernels were built from."""
    found = given or environment.commit()
    if found != "unknown":
        return found
    return f"{facts.built()['facts'].get('commit', 'unknown')} (of the build)"


def _variables(dry: bool) -> dict[str, str]:
    """What the cases' processes have in their environment."""
    if dry:
        return {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TRITON_INTERPRET": "0",
        # Cases run side by side; each bringing its own pool of threads or compilers would not help.
        "OMP_NUM_THREADS": "2",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=_HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=minutes, default=25.0, help="end after this long")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--stages", default="", help=f"of {', '.join(STAGES)}; default all")
    parser.add_argument("--only", default="", help="cases whose id contains this")
    parser.add_argument("--retry", action="store_true", help="run what did not pass again")
    parser.add_argument("--commit", help="what to call the code, where there is no git")
    parser.add_argument("--workers", type=positive, help="processes of stages that are not timed")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    return parser


class Run:
    """One run of the suite."""

    def __init__(self, options: argparse.Namespace, stages: list[str], command: str) -> None:
        self.stages, self.command, self.out = stages, command, options.out
        self.only, self.retry = options.only, options.retry
        self.commit = commit(options.commit)
        self.suite = Suite(dry=options.dry_run)
        self.clock = Clock(60.0 * options.minutes)
        self.journal = Journal(self.out / "results.jsonl")
        size = options.workers or min(max((os.cpu_count() or 2) - 1, 1), _MOST_WORKERS)
        size = 1 if self.suite.dry and not options.workers else size
        self.pool = Pool(_MODULE, asdict(self.suite), _variables(self.suite.dry), size)
        self._ran: set[str] = set()
        self._said = 0.0
        self._lock = threading.Lock()

    def pending(self, name: str) -> list[Case]:
        """The cases of a stage that are still to run."""
        found = []
        for case in STAGES[name].cases(self.suite, self.journal):
            record = self.journal.get(case["id"])
            again = name == _FIRST or (self.retry and record is not None and summary.bad([record]))
            wanted = record is None or (again and case["id"] not in self._ran)
            if wanted and (self.only in case["id"] or name == _FIRST):
                found.append(case | {"stage": name})
        return found

    def stage(self, name: str, until: float) -> None:
        """Run what a stage has left, beginning no case after ``until``."""
        stage, cases = STAGES[name], self.pending(name)
        if not cases:
            return
        width = self.pool.size if stage.PARALLEL else 1
        print(f"[{self.clock.show()}] {name}: {len(cases)} cases, {width} at a time", flush=True)
        done = [0]

        def limit() -> float:
            if time.monotonic() >= until:
                return 0.0
            return min(stage.LIMIT, self.clock.left())

        def finished(case: Case, result: dict[str, Any]) -> None:
            if result["status"] == "timeout" and self.clock.left() <= 0.0:
                return  # its own limit was not reached: it is another run's
            with self._lock:
                self._ran.add(case["id"])
                self.journal.add(case | result | {"commit": self.commit})
                done[0] += 1
                self._say(case, result, f"{done[0]}/{len(cases)}")

        self.pool.run(cases, width, limit, finished)

    def _say(self, case: Case, result: dict[str, Any], count: str) -> None:
        good = result["status"] in summary.GOOD
        if good and time.monotonic() - self._said < _QUIET_SECONDS:
            return
        self._said = time.monotonic()
        text = f"[{self.clock.show()}] {count} {result['status']} {case['id']}"
        print(f"{text}  {result.get('seconds', 0.0):.2f} s", flush=True)
        if not good:
            lines = result.get("faults") or result.get("error", "").splitlines()[-3:]
            print("\n".join(f"    {line}" for line in lines[:3]), flush=True)

    def all(self) -> None:
        """Every stage within its share, then whatever time is left to those that are not done."""
        try:
            for i, name in enumerate(self.stages):
                of = sum(STAGES[n].SHARE for n in self.stages[i:])
                share = of if name == _FIRST else STAGES[name].SHARE
                self.stage(name, self.clock.part(share, of))
                self.write()
                if name == _FIRST and preflight.stops(self.journal.of(name)):
                    print("stopped: set the above right, or leave it out by --stages", flush=True)
                    return
            for name in self.stages:
                self.stage(name, self.clock.part(1.0, 1.0))
        finally:
            self.pool.stop()
            self.write()

    def write(self) -> None:
        """The readable files, as things stand."""
        left = {name: len(self.pending(name)) for name in self.stages}
        summary.write(self.out, self.journal, self.commit, self.command, left)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report; returns the exit code."""
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    stages = [s for s in options.stages.split(",") if s] or list(STAGES)
    if unknown := [s for s in stages if s not in STAGES]:
        parser.error(f"--stages: want some of {', '.join(STAGES)}, got {', '.join(unknown)}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device that torch can use; --dry-run rehearses on the CPU")
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: its cases will say so")
    exits.folder(options.out)
    with exits.refusing(parser, ValueError, OSError):
        run = Run(options, stages, shlex.join(["python", "-m", "benchmarks.gpu", *words]))
    run.all()
    failed = summary.failed(run.journal, run.suite.dry)
    left = sum(len(run.pending(name)) for name in stages)
    print(f"[{run.clock.show()}] {len(list(run.journal))} results, {len(failed)} failed checks, "
          f"{left} cases not reached: {options.out / 'summary.md'}")  # fmt: skip
    return 1 if failed else 0
