"""Malformed calls: each is a TypeError or ValueError that names the argument, says what is wanted
and what came, before anything runs."""

from __future__ import annotations

import pytest

from tests.malformed import model_layer, modules, operators
from tests.malformed.corruptions import Case
from tests.malformed.refusal import failures

CASES = [*operators.cases(), *modules.cases(), *model_layer.cases()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_malformed_call_is_refused_by_name(case: Case) -> None:
    case.call(**case.valid())
    found, _, _ = failures(case)
    assert not found, "\n".join([f"{case.name}:", *found])
