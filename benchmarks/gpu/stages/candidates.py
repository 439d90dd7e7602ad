"""Tiles near the shipped ones: compiled once and compared with the shipped tile's results, side by
side, so that tuning has only timing left to do."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import tables
from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.stopwatch import Stopwatch
from benchmarks.gpu.suite import DTYPES, Case, Suite, in_turn
from petal_kernels.tools import operators, parity

SHARE, LIMIT, PARALLEL, CHECKS = 10.0, 120.0, True, False
_REHEARSED_ROWS = 1


def cases(suite: Suite, journal: Journal) -> list[Case]:
    """Every neighbour of every row; the operators in turn, 16-bit rows first."""
    by_operator = []
    for record in journal.of("rows"):
        rows = record.get("rows", [])
        rows = sorted(rows, key=lambda r: (r["dtype"] == "float32", bool(r["changes"])))
        by_operator.append([{"op": record["op"]} | row for row in rows])
    if suite.dry:
        by_operator = [rows[:_REHEARSED_ROWS] for rows in filter(None, by_operator)][-1:]
    found = []
    for row in in_turn(by_operator):
        near = tables.neighbours(row["tile"])
        for tile in near[-2:] if suite.dry else near:
            name = f"{row['op']}/{row['kernel']} {row['arch']} {row['size']}"
            found.append(row | {"id": f"candidates/{name}/{tables.label(tile)}", "candidate": tile})
    return found


def row_of(case: Case) -> tables.Row:
    """The table row that a case is about."""
    return tables.Row(case["kernel"], case["arch"], case["size"])


@functools.lru_cache(maxsize=2)
def _made(suite: Suite, text: str) -> Any:
    case = json.loads(text)  # a case is no key of a cache, its text is
    op, changed = suite.shape(case)
    inputs = suite.inputs(case)
    names = operators.trainable(op, changed)
    given = operators.options(op, changed) | {"backend": "triton"}
    outs, _ = operators.run(op.public, inputs, (), **given)
    douts = [d.to(o) for d, o in zip(operators.output_gradients(outs), outs, strict=True)]

    def step() -> list[Tensor]:
        results, grads = operators.run(op.public, inputs, names, douts, **given)
        return results + [g for _, g in grads]

    return step, step()


def step_for(case: Case, suite: Suite) -> Any:
    """A training step on Triton that returns every result, and what it returns with the shipped
    tiles; its inputs are made once for the cases that share them."""
    return _made(suite, json.dumps({k: case[k] for k in ("op", "shape", "dtype", "changes")}))


def run(case: Case, suite: Suite) -> dict[str, Any]:
    """Compile, launch, compare; a tile that does not compile, spills or differs is skipped."""
    module = tables.configs(suite.operator(case["op"]))
    step, shipped = step_for(case, suite)
    watch = Stopwatch(suite.device)
    try:
        with (
            tables.using(module, row_of(case), case["candidate"]),
            tables.watching(module, case["kernel"], watch) as seen,
        ):
            got = step()
    except Exception as e:
        if "CUDA error" in str(e):
            raise
        return {"status": "skip", "reason": f"{type(e).__name__}: {e}"[:200]}
    if not seen.times:
        return {"status": "error", "error": "the kernel was not launched"}
    if seen.spills:
        return {"status": "skip", "reason": f"spills {seen.spills} registers"}
    far = max(parity.error(a, b) for a, b in zip(got, shipped, strict=True))
    # Another order of summation moves a result by a rounding step, and fp32 by several.
    if far > 2.0 * max(torch.finfo(DTYPES[case["dtype"]]).eps, 1e-6):
        return {"status": "skip", "reason": f"differs from the shipped tile by {far:.1e}"}
    return {}


def report(records: list[Record]) -> list[str]:
    """How many remain."""
    good = sum(r["status"] == "pass" for r in records)
    return [f"- {good} of {len(records)} tiles near the shipped ones compile, fit and agree"]
