"""The C++ CPU kernels at the operators' real widths: rounding grows with the length of a sum, which
the odd little cases of the common grid do not show."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from petal_kernels._runtime import device
from petal_kernels.tools import parity
from tests.ops.discovery import OPERATORS

pytestmark = pytest.mark.skipif(device.cpu_library_reason() is not None, reason="no CPU library")


def few_rows(shape: Any) -> Any:
    """The shape with a block of rows or two; widths and ranks as they are."""
    lead = getattr(shape, "lead", None)
    if lead is None:  # mode_contract: all of it is small
        return shape
    return dataclasses.replace(shape, lead=(2, 96) if len(lead) == 2 else (192,))


SHAPES = [
    pytest.param(op.name, few_rows(shape), id=f"{op.name}-{shape.name}")
    for op in OPERATORS.values()
    for shape in op.workload.SHAPES
]
_LINEAR = OPERATORS["lowrank_linear"].workload.SHAPES[0]
SHAPES += [
    pytest.param(
        "lowrank_linear",
        dataclasses.replace(
            few_rows(_LINEAR), name="llm", width=4096, outs=(4096,), dropout_at=site, plan=plan
        ),
        id=f"lowrank_linear-4096-{site}-{plan}",
    )
    for site, plan in (("bottleneck", "extend"), ("bottleneck", "update"), ("input", "extend"))
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_real_widths(name: str, shape: Any) -> None:
    found = parity.verify(OPERATORS[name], shape, "native", torch.float32)
    if found.refused is not None:
        pytest.skip(found.refused)
    assert found.faults == []
