"""The terminal: tables with losses in red, and progress with the time left on stderr."""

from __future__ import annotations

import shutil
import sys
import time

from petal_kernels._runtime.columns import columns as aligned
from petal_kernels._runtime.columns import rounded
from petal_kernels.tools.bench.results import Report, Row, Table
from petal_kernels.tools.bench.scenarios import IN_WORDS
from petal_kernels.tools.colours import BOLD, FAINT, RED, painted


def _mega(value: int | None) -> str:
    return "" if value is None else rounded(value / 1e6, 2)


def speedup(row: Row) -> str:
    """Times the published form; a word where there is no such figure, or none that says
    anything."""
    return row.verdict or ("" if row.speedup is None else f"{row.speedup:.2f}x")


def columns(table: Table) -> list[tuple[str, list[str]]]:
    """Headings and cells; a column that is empty in every row is left out."""
    rows = list(table.rows.values())
    found = [
        ("provider", list(table.rows)),
        ("ms", [rounded(r.timing.median, 3) for r in rows]),
        ("p20", [rounded(r.timing.p20, 3) for r in rows]),
        ("p80", [rounded(r.timing.p80, 3) for r in rows]),
        ("wall ms", ["" if r.wall is None else rounded(r.wall.median, 3) for r in rows]),
        ("x published", [speedup(r) for r in rows]),
        ("launches", ["" if r.launches is None else str(r.launches) for r in rows]),
        ("saved MB", [_mega(r.saved_bytes) for r in rows]),
        ("peak MB", [_mega(r.peak_bytes) for r in rows]),
        ("% of roof", ["" if r.roof is None else rounded(100 * r.roof, 0) for r in rows]),
        ("error ratio", ["" if r.errors is None else str(r.errors) for r in rows]),
    ]
    return [(name, cells) for name, cells in found if any(cells)]


def least(table: Table) -> str:
    """Bytes and flops by formula, in words; empty where there is none."""
    if table.moved is None or table.work is None:
        return ""
    moved, work = rounded(table.moved / 1e6, 1), rounded(table.work / 1e9, 2)
    return f"by formula {moved} MB moved, {work} GFLOP"


def notes(table: Table) -> str:
    """Drift, the best other form, traffic by formula, and what else there is to say."""
    found = [f"drift {100 * table.drift:.1f} %"]
    if table.best is not None:
        found.append(f"fastest baseline {table.best}")
    return "; ".join(note for note in (*found, least(table), *table.notes) if note)


def text(table: Table) -> str:
    """One table for the terminal."""
    names, cells = zip(*columns(table), strict=True)
    rows = list(zip(*cells, strict=True))
    head, *body = aligned(names, rows, right=range(1, len(names))).split("\n")
    heading = f"{table.scenario}: {IN_WORDS[table.mode]}"
    lines = ["", painted(heading, BOLD), painted(head, FAINT)]
    for row, line in zip(table.rows.values(), body, strict=True):
        lines.append(painted(line, RED) if row.loss or row.red or row.suspect else line)
    lines.append(f"  {notes(table)}")
    return "\n".join(lines)


def legend(report: Report) -> str:
    """What the columns mean, once, and where the roof is."""
    lines = [
        "drift: the run's own noise; a ratio closer to 1 than it is within noise. red: slower than "
        "the fastest",
        "baseline, too far from fp64, or suspect: above 105 % of the roof. error ratio: outputs / "
        "gradients,",
        "against plain torch in the same dtype (limits 2 / 3), the worst of before and after the "
        "timing.",
    ]
    if report.ceilings is not None:
        c = report.ceilings
        lines.append(
            f"roof, measured in this run: copy {c.gigabytes:.1f} GB/s, "
            f"{report.dtype} product {c.gigaflops:.0f} GFLOP/s."
        )
    return "\n".join(painted(line, FAINT) for line in lines)


class Progress:
    """One line that is written over on a terminal; in a log, one line per scenario."""

    def __init__(self, total: int, modes: int) -> None:
        self.total, self.modes, self.done = total, modes, 0
        self.began = time.perf_counter()
        self.stream = sys.stderr
        self.name, self.mode = "", 0

    def scenario(self, name: str) -> None:
        """The next one begins."""
        self.name, self.mode = name, 0
        if not self.stream.isatty():
            print(f"[{self.done + 1}/{self.total}] {name}{self._left(0.0)}", file=self.stream)
            self.stream.flush()

    def phase(self, name: str, done: int, total: int) -> None:
        """What is going on in it."""
        share = 0.0
        if name == "timing":
            self.mode += done == 1
            share = (self.mode - 1 + done / total) / self.modes
        if self.stream.isatty():
            counted = f" {done}/{total}" if total > 1 else ""
            head = f"[{self.done + 1}/{self.total}] {self.name}: {name}{counted}"
            # A line that wraps is not written over.
            shown = (head + self._left(share))[: shutil.get_terminal_size().columns - 1]
            print(f"\r{shown}\x1b[K", end="", file=self.stream, flush=True)

    def finished(self) -> None:
        """The scenario is over; its line goes."""
        self.done += 1
        self.clear()

    def clear(self) -> None:
        """Make room for a line of the output."""
        if self.stream.isatty():
            print("\r\x1b[K", end="", file=self.stream, flush=True)

    def _left(self, share: float) -> str:
        made = self.done + min(share, 1.0)
        if made < 0.05:
            return ""
        seconds = (time.perf_counter() - self.began) / made * (self.total - made)
        return f", {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"
