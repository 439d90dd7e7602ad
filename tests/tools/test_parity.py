"""The rule of correctness itself: what it allows, and what it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from petal_kernels.tools import parity

EPS = torch.finfo(torch.float32).eps
COLUMN, ROW = torch.tensor([[0.3], [-0.3], [0.0]]), torch.randn(1, 20)


@pytest.mark.parametrize(
    ("result", "numbers"),
    [
        pytest.param(torch.randn(6, 20), 120, id="a matrix"),
        pytest.param(torch.randn(1, 20), 20, id="one row"),
        pytest.param(torch.randn(3), 3, id="a vector"),
        pytest.param(torch.tensor([[2.0]]), 1, id="a single number"),
        pytest.param(COLUMN @ ROW, 1, id="a number and its opposite, times a row"),
        pytest.param(torch.tensor([[1.0], [2.0], [4.0]]) @ ROW, 3, id="three numbers, times a row"),
        pytest.param(ROW.t() @ torch.tensor([[1.0, 2.0, 4.0]]), 3, id="a column, times three"),
        pytest.param(torch.zeros(3, 4), 12, id="zeros"),
    ],
)
def test_how_many_numbers_decide_an_error(result: Tensor, numbers: int) -> None:
    assert parity.numbers(result.double()) == numbers


def test_a_sample_of_one_may_be_rounded_otherwise_than_plain_torchs() -> None:
    """The kind: a check that is red on the next processor, whose sums have another order."""
    exact = (COLUMN @ ROW).double()
    plain, got = exact.float(), (exact * (1 + 2.5 * EPS)).float()
    assert parity.compare("router", got, exact, plain, 3.0)[1] is None
    assert parity.compare("router", exact.float() * (1 + 30 * EPS), exact, plain, 3.0)[1]


def test_of_many_numbers_errors_are_compared() -> None:
    exact = torch.randn(30, 40, dtype=torch.float64)
    plain = exact.float()
    assert parity.compare("dx", plain, exact, plain, 3.0)[1] is None
    assert parity.compare("dx", plain * (1 + 2.5 * EPS), exact, plain, 3.0)[1]
    one = plain.clone()
    one[3, 4] += 0.1
    assert parity.compare("dx", one, exact, plain, 3.0)[1]
