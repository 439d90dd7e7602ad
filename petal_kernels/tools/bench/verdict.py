"""The exit code of a run, with its reasons on stderr."""

from __future__ import annotations

import sys

from petal_kernels.tools import exits
from petal_kernels.tools.bench.results import Report, Row, Table
from petal_kernels.tools.colours import RED, painted


def _say(table: Table, label: str, what: str) -> None:
    text = f"{table.scenario}, {table.mode}: {label} {what}"
    print(painted(text, RED, sys.stderr), file=sys.stderr)


def bounded(row: Row, named: bool) -> bool:
    """Whether --fail-below holds for a row: for the backends that were named, else for what `auto`
    takes."""
    return row.ours and (named or row.chosen)


def verdict(report: Report, fail_below: float | None, named: bool) -> int:
    """2 where a row computes something else, or where the bound could not be asked of a row; 1
    where it is broken."""
    rows = [(t, label, row) for t in report.tables for label, row in t.rows.items()]
    wrong = [each for each in rows if each[2].failed]
    for table, label, row in wrong:
        what = "computes something else" if row.wrong else "is imprecise"
        _say(table, label, f"{what}, error ratio {row.errors}")
    if wrong:
        return exits.REFUSED
    if fail_below is None:
        return exits.FINE
    asked = [each for each in rows if bounded(each[2], named)]
    held = {id(table) for table, _, _ in asked}
    missing = [t for t in report.tables if id(t) not in held]
    for table in missing:
        _say(table, "no row of ours", "was measured to hold against --fail-below")
    code = exits.FINE
    for table, label, row in asked:
        if row.speedup is not None and row.speedup < fail_below:
            noise = ", which is within noise" if row.noise else ""
            _say(table, label, f"{row.speedup:.2f}x < {fail_below}x{noise}")
            code = exits.BROKEN_BOUND
    for table, label, row in asked:
        if row.speedup is None:
            _say(table, label, f"has no speed-up to hold against {fail_below}x: {_why(table, row)}")
            code = exits.REFUSED
    return exits.REFUSED if missing or not asked else code


def _why(table: Table, row: Row) -> str:
    first, reference = next(iter(table.rows.items()))
    return row.verdict or f"{first} is {reference.verdict}"
