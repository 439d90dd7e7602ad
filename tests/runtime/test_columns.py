"""Figures of reports. Kind: what is there, shown as nothing."""

from __future__ import annotations

import pytest

from petal_kernels._runtime.columns import columns, rounded


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (0.0, 2, "0.00"),
        (0, 0, "0"),
        (0.004, 2, "< 0.01"),
        (0.00499999, 2, "< 0.01"),
        (0.0051, 2, "0.01"),
        (-0.004, 2, "> -0.01"),
        (0.4, 0, "< 1"),
        (12.345, 1, "12.3"),
        (0.0004, 3, "< 0.001"),
        (float("inf"), 2, "inf"),
        (float("nan"), 2, "nan"),
    ],
)
def test_a_figure_that_is_not_zero_does_not_read_as_zero(
    value: float, digits: int, shown: str
) -> None:
    assert rounded(value, digits) == shown


def test_such_a_figure_keeps_its_column() -> None:
    rows = [["a", rounded(12.5, 2)], ["b", rounded(0.001, 2)]]
    assert columns(("name", "MB"), rows, right=(1,)).split("\n") == [
        "  name      MB", "  a      12.50", "  b     < 0.01",
    ]  # fmt: skip
