"""The benchmark's operators at their shapes, every provider: through ``petal_kernels.tools.bench``,
whose code this file alone calls."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.stages import preflight
from benchmarks.gpu.suite import DTYPES, Case, Suite, in_turn
from petal_kernels.tools import parity
from petal_kernels.tools.bench import ceilings, measure, timing
from petal_kernels.tools.bench import op as bench_op
from petal_kernels.tools.bench.request import Request
from petal_kernels.tools.bench.scenarios import Scenario

SHARE, LIMIT, PARALLEL, CHECKS = 22.0, 240.0, False, False
MODES = ("train", "full")
_ROUNDS = 20


def cases(suite: Suite, journal: Journal) -> list[Case]:
    """16-bit before fp32, the operators in turn."""
    shapes = in_turn(
        [(op.name, s.name) for s in suite.shapes(op)[: 1 if suite.dry else None]]
        for op in suite.operators()
    )
    found = []
    for dtype in dict.fromkeys((suite.dtype, "float32")):
        for op, shape in shapes:
            name = f"{op}/{dtype}/{shape}"
            compiled = journal.get(f"compiles/{name}")
            slow = compiled is not None and compiled["status"] != "pass"
            slow = slow or not preflight.compiles(journal)
            case = {"id": f"headline/{name}", "op": op, "shape": shape, "dtype": dtype}
            found.append(case | {"uncompiled": slow})
    return found


def build(case: Case, suite: Suite, against: tuple[str, ...]) -> tuple[Scenario, Request]:
    """The benchmark's scenario of a case, against some baselines or, of none, against all."""
    _, shape = suite.shape(case)
    request = Request(
        dtype=DTYPES[case["dtype"]],
        device=torch.device(suite.device),
        against=against,
        modes=MODES,
        rounds=timing.LEAST_ROUNDS if suite.dry else _ROUNDS,
        quick=suite.dry,
    )
    return bench_op.build(case["op"], shape, request, shape.name, None), request


def _against(case: Case, suite: Suite) -> tuple[str, ...]:
    """Every baseline; torch.compile not where it has failed or taken too long on its own."""
    if suite.dry:
        return ("eager",)
    if not case["uncompiled"]:
        return ()
    op, shape = suite.shape(case)
    others: dict[str, Any] = getattr(op.workload, "optional_baselines", lambda *_: {})(
        shape, torch.device(suite.device)
    )
    return (*op.workload.BASELINES, *others, "base")


@functools.cache
def _roof(suite: Suite, dtype: str) -> ceilings.Ceilings:
    return ceilings.measure(torch.device(suite.device), DTYPES[dtype], quick=suite.dry)


def run(case: Case, suite: Suite) -> dict[str, Any]:
    """The benchmark's tables of one shape: errors, counts and times of every provider."""
    scenario, request = build(case, suite, _against(case, suite))
    roof = _roof(suite, case["dtype"])
    tables = measure.measure(scenario, request, roof, lambda *_: None)
    return {"ceilings": asdict(roof), "tables": [table.as_dict() for table in tables]}


def documents(records: list[Record], facts: dict[str, Any], command: str) -> dict[str, Any]:
    """By dtype, a result file as ``petal-kernels bench`` writes it."""
    found: dict[str, Any] = {}
    for r in records:
        if "tables" in r:
            document = found.setdefault(r["dtype"], {
                "environment": facts, "command": command, "dtype": r["dtype"],
                "device": "cuda" if facts.get("gpu") else "cpu", "ceilings": r["ceilings"],
                "absent": {}, "results": [],
            })  # fmt: skip
            document["results"] += r["tables"]
    return found


def report(records: list[Record]) -> list[str]:
    """A row per shape: forward with backward, milliseconds."""
    full = [
        (r, table["rows"])
        for r in records
        for table in r.get("tables", [])
        if table["mode"] == "full"
    ]
    names = dict.fromkeys(name for _, rows in full for name in rows)
    lines = [
        "Forward and backward, milliseconds (median); in brackets the share of the roof; ! is red.",
        "",
        "| shape | dtype | " + " | ".join(names) + " |",
        "|---|---|" + "---:|" * len(names),
    ]
    for r, rows in full:
        cells = [_cell(rows[name]) if name in rows else "" for name in names]
        lines.append(f"| {r['op']} {r['shape']} | {r['dtype']} | {' | '.join(cells)} |")
    return lines


def _cell(row: dict[str, Any]) -> str:
    roof = f" ({100 * row['roof']:.0f} %)" if row.get("roof") is not None else ""
    red = (
        float(row.get("error_outputs", 0.0)) > parity.OUTPUT_FACTOR
        or float(row.get("error_gradients", 0.0)) > parity.GRADIENT_FACTOR
    )
    return f"{row['median']:.3f}{roof}{' !' if red else ''}"
