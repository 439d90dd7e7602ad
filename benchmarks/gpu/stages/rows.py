"""Which rows of Triton's launch tables this machine reads, and a shape that reads each: what tuning
starts from."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu import tables
from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.suite import Case, Suite, changes
from petal_kernels.tools import operators, parity

SHARE, LIMIT, PARALLEL, CHECKS = 2.0, 180.0, True, True
_SMALL_ROWS, _WIDE_RANK = 1024, 256


def cases(suite: Suite, journal: Journal) -> list[Case]:
    """One per operator."""
    return [{"id": f"rows/{op.name}", "op": op.name} for op in suite.operators()]


def _drivers(suite: Suite, shape: Any, dtype: str) -> list[dict[str, Any]]:
    """The shape itself, with few rows, and with a wide rank."""
    lead = tuple(getattr(shape, "lead", ()))
    few = (max(_SMALL_ROWS // lead[1], 1), lead[1]) if len(lead) == 2 else (_SMALL_ROWS,)
    found: list[dict[str, Any]] = [{}]
    if not suite.dry:
        found += [changes(shape, lead=few), changes(shape, rank=_WIDE_RANK)]
    return [{"shape": shape.name, "dtype": dtype, "changes": c} for c in found]


def run(case: Case, suite: Suite) -> dict[str, Any]:
    """The rows, each with the first case that reads it."""
    op = suite.operator(case["op"])
    module = tables.configs(op)
    if module is None:
        return {"status": "skip", "reason": "the operator has no launch tables"}
    found: dict[tables.Row, dict[str, Any]] = {}
    for dtype in dict.fromkeys((suite.dtype, "float32")):
        for shape in suite.shapes(op):
            for driver in _drivers(suite, shape, dtype):
                of = {"op": op.name, **driver}
                _, changed = suite.shape(of)
                inputs = suite.inputs(of)
                if parity.refusal(op, changed, "triton", inputs) is not None:
                    continue
                names = operators.trainable(op, changed)
                given = operators.options(op, changed) | {"backend": "triton"}

                def step(inputs: Any = inputs, names: Any = names, given: Any = given) -> object:
                    return operators.run(op.public, inputs, names, **given)

                for row in tables.touched(module, step):
                    if row not in found:
                        found[row] = driver | {"tile": tables.read(module, row)}
    return {"rows": [row._asdict() | driver for row, driver in found.items()]}


def report(records: list[Record]) -> list[str]:
    """How many rows there are."""
    counts = [f"{r['op']} {len(r['rows'])}" for r in records if "rows" in r]
    return [f"- launch table rows in use: {', '.join(counts)}"] if counts else []
