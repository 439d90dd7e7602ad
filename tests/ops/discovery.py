"""Finds operators by folder; every test of operators walks this and none lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import petal_kernels as pk
from petal_kernels.tools.operators import (
    OPS,
    Operator,
    backend_names,
    cases,
    leaves,
    map_tensors,
    operators,
    options,
    output_gradients,
    require_grad,
    run,
    trainable,
)

__all__ = [
    "CASES",
    "OPERATORS",
    "OPS",
    "SMALL",
    "Operator",
    "backend_names",
    "cases",
    "labelled",
    "leaves",
    "map_tensors",
    "operators",
    "options",
    "output_gradients",
    "require_grad",
    "run",
    "runnable",
    "small",
    "trainable",
]

OPERATORS = {op.name: op for op in operators()}


def small(op: Operator) -> list[Any]:
    """The first few cases: enough variety for the expensive checks."""
    return [c for c in op.workload.CASES if getattr(c, "plan", "auto") == "auto"][:12]


def runnable(op: Operator, case: Any, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends that can run a case here."""
    inputs = op.workload.make_inputs(case, dtype)
    rows = dict(pk.explain(op.public, **inputs).rows)
    return [name for name, reasons in rows.items() if not reasons]


def labelled(label: str) -> Callable[[str], str]:
    """Messages of ``assert_close``, behind a label."""
    return lambda message: f"{label}: {message}"


# (operator's name, case), to parametrize a test with.
CASES = [pytest.param(op.name, case, id=f"{op.name}-{case.name}") for op, case in cases()]
SMALL = [
    pytest.param(op.name, case, id=f"{op.name}-{case.name}")
    for op in OPERATORS.values()
    for case in small(op)
]
