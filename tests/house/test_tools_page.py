"""Every row of docs/tools.md names a test, and the test is there."""

from __future__ import annotations

import re

from tests.house.test_mutants import defined
from tests.mutants.__main__ import ROOT

PAGE = ROOT / "docs" / "tools.md"


def test_every_row_names_a_test_that_is_there() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)` \|$", row)
        assert len(named) == 1, row
        file, function = named[0]
        assert function in defined(file), row
