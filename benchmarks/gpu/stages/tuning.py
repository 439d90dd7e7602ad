"""Every row's remaining candidates against the shipped tile: its kernel alone, interleaved, cold
cache."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.gpu import tables
from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.stages import candidates
from benchmarks.gpu.stopwatch import Stopwatch
from benchmarks.gpu.suite import Case, Suite

SHARE, LIMIT, PARALLEL, CHECKS = 5.0, 120.0, False, False
WORTHWHILE = 1.03  # below this a winner is noise
_ROUNDS = 15


def cases(suite: Suite, journal: Journal) -> list[Case]:
    """One per row of which every candidate has been tried and some are left."""
    rows: dict[str, Case] = {}
    for record in journal.of("candidates"):
        row = {k: record[k] for k in ("op", "shape", "dtype", "changes", *tables.Row._fields)}
        case_id = _row_id(record)
        case = rows.setdefault(case_id, {"id": case_id, **row, "tiles": [record["tile"]]})
        if record["status"] == "pass":
            case["tiles"].append(record["candidate"])
    for candidate in candidates.cases(suite, journal):
        if candidate["id"] not in journal:
            rows.pop(_row_id(candidate), None)
    return [case for case in rows.values() if len(case["tiles"]) > 1]


def _row_id(candidate: Case) -> str:
    row: str = candidate["id"].split("/", 1)[1].rsplit("/", 1)[0]
    return f"tuning/{row}"


def run(case: Case, suite: Suite) -> dict[str, Any]:
    """The kernel's milliseconds with each tile; the first is the shipped one."""
    module = tables.configs(suite.operator(case["op"]))
    step, _ = candidates.step_for(case, suite)
    watch, row = Stopwatch(suite.device), candidates.row_of(case)
    samples: list[list[float]] = [[] for _ in case["tiles"]]
    for i in range(0 if suite.dry else -1, 1 if suite.dry else _ROUNDS):
        for tile, taken in zip(case["tiles"], samples, strict=True):
            with tables.using(module, row, tile):
                watch.queue()
                with tables.watching(module, case["kernel"], watch) as seen:
                    step()
                watch.wait()
            if i >= 0:  # the first round loads what was compiled
                taken.append(seen.milliseconds())
    ms = [statistics.median(taken) for taken in samples]
    best = min(range(len(ms)), key=ms.__getitem__)
    return {
        "shipped_ms": round(ms[0], 5),
        "best": case["tiles"][best],
        "best_ms": round(ms[best], 5),
        "speedup": round(ms[0] / ms[best], 4),
        "ms": {tables.label(t): round(m, 5) for t, m in zip(case["tiles"], ms, strict=True)},
    }


def winners(records: list[Record]) -> dict[str, list[dict[str, Any]]]:
    """By operator, the rows whose best tile is worth a change, as a launch table reads them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for r in records:
        if r["status"] == "pass" and r["speedup"] >= WORTHWHILE:
            row = {k: r[k] for k in tables.Row._fields} | r["best"]
            found.setdefault(r["op"], []).append(row | {"speedup": r["speedup"]})
    return found


def report(records: list[Record]) -> list[str]:
    """The rows that gain."""
    lines = [
        "| operator | row | shipped ms | best | best ms | times |",
        "|---|---|---:|---|---:|---:|",
    ]
    for r in sorted(records, key=lambda r: -r.get("speedup", 0.0)):
        if r.get("speedup", 0.0) >= WORTHWHILE:
            row = f"{r['kernel']} {r['arch']} {r['size']}"
            best = tables.label(r["best"])
            lines.append(
                f"| {r['op']} | {row} | {r['shipped_ms']} | {best} | {r['best_ms']} "
                f"| {r['speedup']:.2f} |"
            )
    return [f"{len(records)} rows timed; those that gain {WORTHWHILE:.2f} times:", "", *lines]
