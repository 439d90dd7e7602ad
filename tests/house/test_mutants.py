"""The planted faults still fit the sources they are planted in; ``make mutants`` plants them."""

from __future__ import annotations

import ast
import functools
import importlib
import json

import pytest

from tests.mutants.__main__ import CAUGHT_BY, ROOT, families
from tests.ops import folders

FAMILIES = {name: importlib.import_module(f"tests.mutants.{name}") for name in families()}
FAULTS = [
    pytest.param(*fault, id=f"{name}-{i}")
    for name, family in FAMILIES.items()
    for i, fault in enumerate(family.MUTANTS)
]


@pytest.mark.parametrize(("file", "old", "new"), FAULTS)
def test_a_fault_can_be_planted(file: str, old: str, new: str) -> None:
    assert old != new
    assert old in (ROOT / file).read_text()


@pytest.mark.parametrize("backend", ["torch", "native", "triton", "cuda"])
def test_every_operator_has_faults_in_each_backend(backend: str) -> None:
    planted = "\n".join(file for file, _, _ in FAMILIES[backend].MUTANTS)
    assert [name for name in folders.names(f"{backend}_impl") if name not in planted] == []


@functools.cache
def defined(file: str) -> set[str]:
    """The functions of a test file; none where it is gone."""
    path = ROOT / file
    if not path.is_file():
        return set()
    return {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("family", families())
def test_a_family_s_tests_exist(family: str) -> None:
    for test in FAMILIES[family].TESTS:
        if test.startswith("tests/"):
            file, _, function = test.partition("::")
            assert (ROOT / file).exists(), test
            assert not function or function in defined(file), test


def test_who_caught_a_fault_exists() -> None:
    """A test that was moved or renamed takes its line of caught_by.json along."""
    known = json.loads(CAUGHT_BY.read_text()).values()
    tests = {test.partition("[")[0] for test in known if "::" in test}
    assert tests
    gone = [t for t in sorted(tests) if t.split("::")[-1] not in defined(t.split("::")[0])]
    assert gone == []
