"""Fixtures of the operators' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from petal_kernels import _build_info


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    """The instruction sets that this build has and this CPU runs; the best is restored."""
    names = _build_info.facts()["isas"].split(",")
    capability = _build_info.cpu_capability()
    yield [n for n in names if capability.get(n, True)]
    torch.ops.petal_native.cpu_isa("best")
