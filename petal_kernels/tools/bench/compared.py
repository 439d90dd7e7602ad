"""`petal-kernels bench compare A.json B.json`: what has changed from one run to another.

A row has changed where its medians differ by more than the drift of either run. Runs of different
machines are refused with what differs, for then a ratio says nothing about the code; `--anyway`
compares them all the same. Exit code: 0 nothing is slower; 1 something is slower beyond both
drifts; 2 they cannot be compared, or a row that A vouches for is wrong or suspect in B.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from petal_kernels._runtime.columns import columns
from petal_kernels.tools import exits
from petal_kernels.tools.bench.judge import change
from petal_kernels.tools.colours import BOLD, GREEN, RED, painted

MACHINE = ("cpu", "cpu_capability", "threads", "gpu", "system")
_SAID = ("commit", "petal_kernels", "torch", "triton", "python", "date")
_UNITS = {"milliseconds": 1.0, "microseconds": 1e-3}
Key = tuple[str, str, str]  # scenario, mode, provider


@dataclass(frozen=True)
class Cell:
    """One provider's milliseconds, its table's drift, and why it is not vouched for, if so."""

    median: float
    drift: float
    doubt: str = ""


@dataclass
class Run:
    """A result file."""

    path: Path
    machine: dict[str, Any]
    environment: dict[str, Any]
    partial: str | None
    cells: dict[Key, Cell] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """A row of both files: B's time over A's, and the drift it is held against."""

    key: Key
    before: Cell
    after: Cell

    @property
    def ratio(self) -> float:
        """B's milliseconds over A's: above 1 is slower."""
        return self.after.median / self.before.median

    @property
    def drift(self) -> float:
        """The larger of both."""
        return max(self.before.drift, self.after.drift)

    @property
    def real(self) -> bool:
        """Whether the times differ by more than both drifts."""
        return change(self.ratio) > self.drift


def _doubt(row: dict[str, Any]) -> str:
    """Why a row's time says nothing, from its fields; files of before `verdict` have the errors."""
    said = row.get("verdict", "")
    if said in ("WRONG", "suspect") or (said == "imprecise" and row.get("ours")):
        return str(said)
    limits = {"error_outputs": 2.0, "error_gradients": 3.0}
    red = any(row.get(k) == "inf" or row.get(k, 0.0) > v for k, v in limits.items())
    return "imprecise" if red and row.get("ours") else ""


def _cells(entry: dict[str, Any]) -> dict[Key, Cell]:
    drift, scenario, mode = float(entry["drift"]), str(entry["scenario"]), entry.get("mode", "")
    rows = {
        label: (float(row["median"]), _doubt(row)) for label, row in entry.get("rows", {}).items()
    }
    for name, factor in _UNITS.items():  # of `plans` and `overhead`
        rows |= {label: (factor * v, "") for label, v in entry.get(name, {}).items()}
    for label, (median, _) in rows.items():
        if not (math.isfinite(median) and median > 0.0 and math.isfinite(drift)):
            raise ValueError(f"{scenario}: {label} has no time: {median}")
    return {(scenario, mode, label): Cell(m, drift, why) for label, (m, why) in rows.items()}


def load(path: Path) -> Run:
    """A result file that `bench` wrote. Raises Refusal where it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        environment = document["environment"]
        machine = {name: environment.get(name) for name in MACHINE}
        machine |= {name: document.get(name) for name in ("device", "dtype")}
        run = Run(path, machine, environment, document.get("partial"))
        for entry in document["results"]:
            run.cells |= _cells(entry)
    except OSError as error:
        raise exits.Refusal(f"want a result file, got {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise exits.Refusal(f"want a result file of bench, got {path}: {why}") from error
    return run


def differences(a: Run, b: Run) -> list[str]:
    """What differs of the machines, in words."""
    return [
        f"{name}: {a.machine[name]} and {b.machine[name]}"
        for name in a.machine
        if a.machine[name] != b.machine[name]
    ]


def changes(a: Run, b: Run) -> list[Change]:
    """The rows of both that both vouch for, in A's order."""
    found = [Change(key, cell, b.cells[key]) for key, cell in a.cells.items() if key in b.cells]
    return [c for c in found if not (c.before.doubt or c.after.doubt)]


def _table(found: Sequence[Change]) -> str:
    names = ("scenario", "mode", "provider", "A ms", "B ms", "B / A", "drift")
    rows = []
    for c in found:
        times = (f"{c.before.median:.3f}", f"{c.after.median:.3f}", f"{c.ratio:.2f}x")
        rows.append((*c.key, *times, f"{100 * c.drift:.1f} %"))
    head, *body = columns(names, rows, right=range(3, len(names))).split("\n")
    lines = [painted(head, BOLD)]
    for c, line in zip(found, body, strict=True):
        lines.append(painted(line, RED if c.ratio > 1.0 else GREEN))
    return "\n".join(lines)


def compare(a: Run, b: Run) -> int:
    """Print what has changed; the exit code."""
    for name, run in (("A", a), ("B", b)):
        said = ", ".join(f"{k} {run.environment[k]}" for k in _SAID if run.environment.get(k))
        print(f"{name}: {run.path} ({said})" + (f", partial: {run.partial}" if run.partial else ""))
    both = changes(a, b)
    lost = [key for key, cell in b.cells.items() if cell.doubt and _vouched(a, key)]
    for key in lost:
        print(painted(f"{', '.join(filter(None, key))}: {b.cells[key].doubt} in B", RED))
    if not both and not lost:
        raise exits.Refusal(f"{a.path} and {b.path} have no row in common that says something")
    real = [c for c in both if c.real]
    slower = [c for c in real if c.ratio > 1.0]
    if real:
        print(f"\n{_table(real)}")
    print(f"\n{len(both)} rows in both: {len(slower)} slower, {len(real) - len(slower)} faster, "
          f"{len(both) - len(real)} within noise")  # fmt: skip
    for name, one, other in (("A", a, b), ("B", b, a)):
        if alone := len(one.cells.keys() - other.cells.keys()):
            print(f"{alone} rows in {name} only")
    if slower:
        return exits.BROKEN_BOUND
    return exits.REFUSED if lost else exits.FINE


def _vouched(run: Run, key: Key) -> bool:
    return key in run.cells and not run.cells[key].doubt


def main(words: Sequence[str], program: str) -> int:
    """Parse, load, compare; the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"{program} compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A.json", help="before")
    parser.add_argument("b", type=Path, metavar="B.json", help="after")
    parser.add_argument("--anyway", action="store_true", help="though the machines differ")
    args = parser.parse_intermixed_args(list(words))
    a, b = load(args.a), load(args.b)
    found = differences(a, b)
    if found and not args.anyway:
        raise exits.Refusal(
            f"other machines, or other runs: {'; '.join(found)} (--anyway compares all the same)"
        )
    if found:
        print(painted(f"not the same machine: {'; '.join(found)}", RED))
    return compare(a, b)
