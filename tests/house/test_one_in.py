"""Which rows ``make test`` leaves to ``make test-all``."""

from __future__ import annotations

import pytest

from tests import one_in

ROWS = """
import pytest

@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", range(12))
@pytest.mark.parametrize("dtype", ["a", "b", "c"])
def test_all_rows(case, dtype): pass

@pytest.mark.one_in(4, of="slow")
@pytest.mark.parametrize("backend", ["slow", "fast"])
@pytest.mark.parametrize("case", range(8))
def test_some_rows(case, backend): pass

@pytest.mark.parametrize("case", range(5))
def test_unmarked(case): pass
"""


class Spare:
    """What was marked and what not, by the test's name and row."""

    def __init__(self) -> None:
        self.left_out: set[str] = set()
        self.always: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        one_in.mark_others(items)
        for item in items:
            (self.left_out if item.get_closest_marker("spare") else self.always).add(item.name)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Spare:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "test_rows.py").write_text(ROWS)
    spare = Spare()
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    assert pytest.main([str(folder), *options], plugins=[spare]) == 0
    return spare


def test_a_third_of_the_rows_with_every_value_of_the_last_axis(found: Spare) -> None:
    rows = {name for name in found.always if name.startswith("test_all_rows")}
    assert len(rows) == 12
    assert len({name.split("[")[1].split("-")[0] for name in rows}) == 3


def test_only_rows_of_the_named_kind_are_left_out(found: Spare) -> None:
    left = {name for name in found.left_out if name.startswith("test_some_rows")}
    assert len(left) == 6
    assert all("slow" in name for name in left)


def test_a_test_without_the_mark_runs_whole(found: Spare) -> None:
    assert sum(name.startswith("test_unmarked") for name in found.always) == 5


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_rows_are_shared_out(n: int) -> None:
    """One in n; of a grid whose last axis has n values, each value; other tests, other rows."""
    names = [f"tests/a.py::test_{i}" for i in range(40)]
    rows = {name: [i for i in range(n * n) if one_in.chosen(i, n, name)] for name in names}
    assert all(len(each) == n for each in rows.values())
    assert all({i % n for i in each} == set(range(n)) for each in rows.values())
    assert {i for each in rows.values() for i in each} == set(range(n * n))
