"""Whether this machine can run anything at all: our libraries load, a kernel of each runs,
torch.compile finds its compilers. A run stops where ours do not: every later case would fail, or be
declined and look well."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.suite import DTYPES, Case, Suite
from petal_kernels._runtime import device
from petal_kernels.tools import operators, parity

SHARE, LIMIT, PARALLEL, CHECKS = 1.0, 120.0, True, True
_COMPILE = "torch.compile"


def cases(suite: Suite, journal: Journal) -> list[Case]:
    """Our backends, and the compiler that they are compared with."""
    kinds = suite.kernels[:1] if suite.dry else (*suite.kernels, _COMPILE)
    return [{"id": f"preflight/{kind}", "kind": kind} for kind in kinds]


def stops(records: list[Record]) -> bool:
    """Whether one of our backends cannot run."""
    return any(r["status"] not in ("pass", "skip") for r in records if r["kind"] != _COMPILE)


def compiles(journal: Journal) -> bool:
    """Whether torch.compile has not been seen to fail."""
    record = journal.get(f"preflight/{_COMPILE}")
    return record is None or record["status"] == "pass"


def run(case: Case, suite: Suite) -> dict[str, Any]:
    """One training step of the smallest operator; whether it is right, later stages say."""
    if case["kind"] == _COMPILE:
        x = torch.randn(1 << 16, device=suite.device)
        torch.compile(lambda x: (2.0 * x).relu() + 1.0)(x)
        return {}
    op = suite.operator("mode_contract")
    shape = op.workload.CASES[0]
    inputs = op.workload.make_inputs(shape, DTYPES[suite.dtype], suite.device)
    reason = parity.refusal(op, shape, case["kind"], inputs)
    if reason is not None:
        absent = case["kind"] == "triton" and device.triton_reason() is not None
        return {"status": "skip" if suite.dry or absent else "fail", "faults": [reason]}
    given = operators.options(op, shape) | {"backend": case["kind"]}
    operators.run(op.public, inputs, operators.trainable(op, shape), **given)
    return {}


def report(records: list[Record]) -> list[str]:
    """A line per part."""
    return [f"- {r['kind']}: {r['status']}" for r in records]
