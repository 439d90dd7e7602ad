"""The bounds against closed forms, the sparse form against the dense one, the released weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from petal_kernels.nn.mutual_information import (
    Answers,
    ClubBound,
    MineBound,
    MutualInformationLoss,
)


def correlated(n: int, rho: float, seed: int, dims: int = 2) -> tuple[Tensor, Tensor]:
    """Pairs of normal vectors: I = -dims / 2 log(1 - rho^2)."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, dims, generator=g)
    return a, rho * a + math.sqrt(1 - rho * rho) * b


def test_the_sparse_form_is_the_dense_one() -> None:
    """Repeated tokens, tokens in both answers, ignored positions."""
    torch.manual_seed(0)
    club = ClubBound(12, 40, 8).double()
    z = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 6, (5, 7))
    labels[1, 4:] = labels[3, 1:] = -100
    labels[4] = 3
    for count in (False, True):
        answers = Answers.of(labels, count_ignored=count)
        answers = Answers(answers.ids, answers.weights.double())
        other = answers.permuted(torch.tensor([2, 0, 4, 3, 1]))
        sparse = club.tokens(z, answers, other)
        dense = club.dense(z, answers.dense(40), other.dense(40))
        torch.testing.assert_close(sparse, dense)
        for a, b in zip(
            torch.autograd.grad(sparse, (z, *club.parameters())),
            torch.autograd.grad(dense, (z, *club.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_answers_are_means_of_one_hot_vectors() -> None:
    labels = torch.tensor([[3, 3, 1, -100], [2, -100, -100, -100]])
    kept = Answers.of(labels).dense(5)
    assert kept.tolist() == [[0, pytest.approx(1 / 3), 0, pytest.approx(2 / 3), 0], [0, 0, 1, 0, 0]]
    released = Answers.of(labels, count_ignored=True).dense(5)
    assert released.tolist() == [[0.25, 0.25, 0, 0.5, 0], [0.75, 0, 0.25, 0, 0]]


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_club_of_a_fitted_q(rho: float) -> None:
    """Fitted by likelihood, CLUB tends to dims rho^2 / (1 - rho^2), which is above I."""
    torch.manual_seed(1)
    club = ClubBound(2, 2, 32)
    optimizer = torch.optim.Adam(club.parameters(), lr=1e-2)
    for step in range(400):
        z, y = correlated(512, rho, step)
        optimizer.zero_grad()
        club.likelihood(z, y).backward()
        optimizer.step()
    z, y = correlated(200_000, rho, 9999)
    with torch.no_grad():
        found = club.dense(z, y, y.roll(1, 0)).item()
    limit, exact = 2 * rho**2 / (1 - rho**2), -math.log(1 - rho**2)
    assert found == pytest.approx(limit, rel=0.15, abs=0.03)
    assert found > exact - 0.03


def test_mine_of_a_trained_critic() -> None:
    """Below I, and near it; of independent pairs, zero."""
    torch.manual_seed(2)
    for rho in (0.0, 0.8):
        mine = MineBound(2, 2, 64)
        optimizer = torch.optim.Adam(mine.parameters(), lr=1e-2)
        for step in range(600):
            x, z = correlated(512, rho, step)
            optimizer.zero_grad()
            (-mine(x, z, z.roll(1, 0))).backward()
            optimizer.step()
        x, z = correlated(100_000, rho, 9999)
        with torch.no_grad():
            found = mine(x, z, z.roll(1, 0)).item()
        exact = -math.log(1 - rho**2)
        assert found < exact + 0.03
        assert found > 0.8 * exact - 0.03


def test_full_size_counts() -> None:
    """2,307,210 parameters as released, the trained weight among them; fixed, one less."""
    released = MutualInformationLoss(1408, 768, 32100, variant="release", device="meta")
    assert sum(p.numel() for p in released.parameters()) == 2_307_210
    paper = MutualInformationLoss(1408, 768, 32100, device="meta")
    assert sum(p.numel() for p in paper.parameters()) == 2_307_209


def batch() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    image, queries = torch.randn(4, 9, 10, generator=g), torch.randn(4, 5, 6, generator=g)
    return image, queries.requires_grad_(), torch.randint(0, 20, (4, 3), generator=g)


def test_the_released_weight_starts_without_a_gradient_for_anything_else() -> None:
    loss = MutualInformationLoss(10, 6, 20, variant="release")
    image, queries, labels = batch()
    loss(image, queries, labels).backward()
    assert queries.grad is not None
    assert not queries.grad.any()
    assert isinstance(loss.weight, torch.nn.Parameter)
    assert loss.weight.grad is not None
    assert loss.weight.grad.abs() > 0


def test_the_fixed_weight_scales_and_the_likelihood_trains_q_alone() -> None:
    image, queries, labels = batch()
    values = []
    for weight in (0.5, -1.0):
        torch.manual_seed(7)
        loss = MutualInformationLoss(10, 6, 20, weight=weight)
        torch.manual_seed(8)
        values.append(loss(image, queries, labels))
    torch.testing.assert_close(values[1], -2 * values[0])
    values[0].backward()
    assert queries.grad is not None
    assert queries.grad.abs().sum() > 0
    queries.grad = None
    loss.likelihood(queries, labels).backward()
    assert queries.grad is None
    assert all(p.grad is not None for p in loss.club.parameters())
    with pytest.raises(ValueError, match="weight: want None with variant='release'"):
        MutualInformationLoss(10, 6, 20, weight=0.1, variant="release")
    with pytest.raises(ValueError, match=r"labels: want shape \[4, T\], got \[4\]"):
        loss(image, queries, labels[:, 0])


def test_autocast_does_not_reach_inside() -> None:
    loss = MutualInformationLoss(10, 6, 20)
    image, queries, labels = batch()
    torch.manual_seed(3)
    want = loss(image, queries, labels)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(image, queries, labels)
    assert torch.equal(got, want)
