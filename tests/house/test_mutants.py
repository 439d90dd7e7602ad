"""The planted faults still fit the sources they are planted in; ``make mutants`` plants them."""

from __future__ import annotations

import importlib

import pytest

from tests.mutants.__main__ import ROOT, families

FAULTS = [
    pytest.param(*fault, id=f"{name}-{i}")
    for name in families()
    for i, fault in enumerate(importlib.import_module(f"tests.mutants.{name}").MUTANTS)
]


@pytest.mark.parametrize(("file", "old", "new"), FAULTS)
def test_a_fault_can_be_planted(file: str, old: str, new: str) -> None:
    assert old != new
    assert old in (ROOT / file).read_text()
