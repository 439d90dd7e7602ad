"""Finds operators by folder; every test of operators walks this and none lists them."""

from __future__ import annotations

from petal_kernels.tools.operators import (
    OPS,
    Operator,
    backend_names,
    cases,
    leaves,
    map_tensors,
    operators,
    output_gradients,
    require_grad,
    run,
    trainable,
)

__all__ = [
    "OPS",
    "Operator",
    "backend_names",
    "cases",
    "leaves",
    "map_tensors",
    "operators",
    "output_gradients",
    "require_grad",
    "run",
    "trainable",
]
