"""Fixtures of the operators' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from petal_kernels import _build_info
from petal_kernels.tools import parity


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    """The instruction sets that this build has and this CPU runs; the best is restored."""
    names = _build_info.facts()["isas"].split(",")
    capability = _build_info.cpu_capability()
    yield [n for n in names if capability.get(n, True)]
    torch.ops.petal_native.cpu_isa("best")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty returns NaN, so an output element that a kernel does not write is seen."""
    with parity.poisoned():
        yield
