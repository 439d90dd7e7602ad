"""Every operator, plan, backend and dtype against fp64, outputs and gradients, and the same bits
twice: real shapes, then the test suite's odd ones."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.suite import DTYPES, Case, Suite, in_turn
from petal_kernels.tools import parity
from petal_kernels.tools.operators import Operator

SHARE, LIMIT, PARALLEL, CHECKS = 28.0, 180.0, True, True
_REHEARSED_CASES = 2


def _shapes(suite: Suite, op: Operator) -> list[tuple[str, dict[str, Any]]]:
    """Names with changes: real shapes as planned, then in every plan, then the small cases."""
    planner = op.module("planner")
    plans = planner.PLANS if planner else ()
    real = [shape.name for shape in suite.shapes(op)]
    found: list[tuple[str, dict[str, Any]]] = [(name, {"plan": "auto"} if plans else {})
                                               for name in real]  # fmt: skip
    found += [(name, {"plan": plan}) for name in real for plan in plans]
    small = op.workload.CASES[1 : 1 + _REHEARSED_CASES] if suite.dry else op.workload.CASES
    return found + [(c.name, {}) for c in small]


def _turn(case: Case, suite: Suite) -> int:
    """What is compiled already goes first. A Triton case takes seconds for its compiler: the real
    shapes as planned in every dtype, then the rest dtype by dtype, the 16-bit twin last."""
    if case["backend"] == suite.kernels[0]:
        return 0
    if case["backend"] == "triton":
        return 1 if case["planned"] else 2 + 2 * suite.dtypes.index(case["dtype"])
    return 3 if case["planned"] else 5


def cases(suite: Suite, journal: Journal) -> list[Case]:
    """The most telling for their time first; within a turn dtype by dtype, the operators in
    turn."""
    every = suite.operators()
    real = {op.name: {shape.name for shape in suite.shapes(op)} for op in every}
    turns = in_turn([(op.name, *shape) for shape in _shapes(suite, op)] for op in every)
    found = []
    for backend in suite.backends:
        few = suite.dry and backend == "triton"  # seconds each
        for dtype in suite.dtypes:
            for name, shape, changes in turns[: len(every)] if few else turns:
                label = " ".join((shape, *changes.values()))
                found.append(
                    {
                        "id": f"correctness/{name}/{backend}/{dtype}/{label}",
                        "op": name,
                        "shape": shape,
                        "changes": changes,
                        "backend": backend,
                        "dtype": dtype,
                        "planned": shape in real[name] and changes.get("plan", "auto") == "auto",
                    }
                )
    return sorted(found, key=lambda case: _turn(case, suite))


def run(case: Case, suite: Suite) -> dict[str, Any]:
    """The check that the doctor and the tests make."""
    op, shape = suite.shape(case)
    found = parity.verify(op, shape, case["backend"], DTYPES[case["dtype"]], suite.device)
    if found.refused is not None:
        return {"status": "skip", "reason": found.refused}
    status = "fail" if found.faults else "pass"
    return {"status": status, "ratio": round(found.ratio, 4), "faults": found.faults[:8]}


def report(records: list[Record]) -> list[str]:
    """A row per operator, backend and dtype."""
    rows: dict[tuple[str, str, str], list[Record]] = {}
    for r in records:
        rows.setdefault((r["op"], r["backend"], r["dtype"]), []).append(r)
    lines = [
        "Error as a share of what is allowed; 1.00 is the limit.",
        "",
        "| operator | backend | dtype | passed | not | declined | worst |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for key, found in sorted(rows.items()):
        passed = [r for r in found if r["status"] == "pass"]
        declined = sum(r["status"] == "skip" for r in found)
        ratio = max((r["ratio"] for r in passed), default=0.0)
        counts = f"{len(passed)} | {len(found) - len(passed) - declined} | {declined}"
        lines.append(f"| {' | '.join(key)} | {counts} | {ratio:.2f} |")
    return lines
