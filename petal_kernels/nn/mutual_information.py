"""PETAL's mutual-information objective: an upper bound on I(Z; Y), a lower bound on I(X; Z).

x [B, Dx] is the mean of a sample's image tokens, z [B, D] the mean of its query outputs, y [B,
vocabulary] the mean of the one-hot vectors of its answer's tokens.

    CLUB  q(y | z) = N(mu(z), diag v(z)),  mu = W2 relu(W1 z),  log v = tanh(W4 relu(W3 z))
          I_zy = 1/2 mean_b sum_t [(mu - y')^2 - (mu - y)^2] / (v + 1e-6),  y' = y permuted over b
    MINE  T = a perceptron of [x; z];  I_xz = mean_b T(x, z) - [logsumexp_b T(x, z') - log B],
          z' = z drawn again over b, with replacement
    objective = I_zy - 0.1 I_xz;  the loss adds weight * objective

**Exact sparse form.** (mu - y')^2 - (mu - y)^2 = y'^2 - y^2 + 2 mu (y - y') vanishes at every token
that is in neither answer. With c the weight of a position (y is the sum of c over positions),
summed over positions p of the answer minus those of the other one,

    c_p (2 mu_p - y_p) / (v_p + 1e-6),   mu_p, v_p, y_p at the token of p

so that two rows of W2 and W4 per position are read, and no [B, vocabulary] tensor is formed.

What is unconfirmed, and what we do. The released code keeps this term but does not call it. It
weighs it by a scalar that is trained from 0: at step 0 nothing else receives a gradient, and the
scalar then runs off with the sign opposite to the objective, unbounded below (`variant="release"`
reproduces that). q is never fitted there, and CLUB is an upper bound only for a fitted q: add
`likelihood` to the loss, which reaches q alone. The published signs minimise I(Z; Y) and maximise
I(X; Z), the reverse of an information bottleneck; a negative `weight` turns both. Positions that
are ignored (-100) are left out; the release counts them as token 0.

Source: PETAL arXiv 2312.12458; CLUB arXiv 2006.12013; MINE arXiv 1801.04062.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels._runtime import checks
from petal_kernels._runtime.autocast import autocast_off
from petal_kernels.nn.arguments import (
    check_choice,
    check_range,
    check_rows,
    check_size,
    check_storage,
)

IGNORED = -100
FLOOR = 1e-6


class Answers(NamedTuple):
    """Token answers as positions: ids [B, T] and the weight of each position [B, T], summing to 1
    over a sample (0 where it is ignored)."""

    ids: Tensor
    weights: Tensor

    @classmethod
    def of(cls, labels: Tensor, *, count_ignored: bool = False) -> Answers:
        """From labels [B, T] with -100 where a position is ignored."""
        kept = labels != IGNORED
        ids = labels.masked_fill(~kept, 0)
        weights = torch.ones_like(ids, dtype=torch.float32) if count_ignored else kept.float()
        return cls(ids, weights / weights.sum(1, keepdim=True).clamp_min(1))

    def permuted(self, order: Tensor) -> Answers:
        """Other samples' answers."""
        return Answers(self.ids[order], self.weights[order])

    def own(self) -> Tensor:
        """[B, T]: y at the token of each position, all positions of that token together."""
        same = self.ids.unsqueeze(2) == self.ids.unsqueeze(1)
        return (same * self.weights.unsqueeze(1)).sum(2)

    def dense(self, vocabulary: int) -> Tensor:
        """y itself, [B, vocabulary]."""
        y = self.weights.new_zeros(len(self.ids), vocabulary)
        return y.scatter_add(1, self.ids, self.weights)


class ClubBound(nn.Module):
    """q(y | z) of the module docstring: an upper bound on I(Z; Y) in nats, once q is fitted."""

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: int = 32,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.outputs = check_size("outputs", outputs)
        check_size("features", features)
        check_size("hidden", hidden)
        check_storage(device, None)
        self.mean = _perceptron(features, hidden, outputs, device)
        self.log_variance = _perceptron(features, hidden, outputs, device)

    def _all(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean: Tensor = self.mean(z)
        return mean, torch.tanh(self.log_variance(z))

    def dense(self, z: Tensor, y: Tensor, other: Tensor) -> Tensor:
        """I_zy for any y and other [B, outputs]."""
        mean, log_variance = self._all(z)
        parts = (mean - other).square() - (mean - y).square()
        return 0.5 * (parts / (log_variance.exp() + FLOOR)).sum(1).mean()

    def tokens(self, z: Tensor, answers: Answers, other: Answers) -> Tensor:
        """The same where y and other are answers: reads the outputs at their tokens alone."""
        ids = torch.cat((answers.ids, other.ids), dim=1)
        mean = _rows(self.mean, z, ids)
        log_variance = torch.tanh(_rows(self.log_variance, z, ids))
        weights = torch.cat((answers.weights, -other.weights), dim=1)
        own = torch.cat((answers.own(), other.own()), dim=1)
        return 0.5 * (weights * (2 * mean - own) / (log_variance.exp() + FLOOR)).sum(1).mean()

    def likelihood(self, z: Tensor, y: Tensor) -> Tensor:
        """The mean of -log q(y | z): the loss that fits q. z and y get no gradient."""
        mean, log_variance = self._all(z.detach())
        square = (mean - y.detach()).square() * torch.exp(-log_variance)
        total: Tensor = (square + log_variance + math.log(2 * math.pi)).sum(1).mean()
        return 0.5 * total


class MineBound(nn.Module):
    """T(x, z) of the module docstring: a lower bound on I(X; Z) in nats."""

    def __init__(
        self,
        x_features: int,
        z_features: int,
        hidden: int = 64,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        width = check_size("x_features", x_features) + check_size("z_features", z_features)
        check_size("hidden", hidden)
        check_storage(device, None)
        self.critic = _perceptron(width, hidden, 1, device)

    def forward(self, x: Tensor, z: Tensor, other: Tensor) -> Tensor:
        """I_xz; `other` are z's of other samples."""
        joint = self.critic(torch.cat((x, z), dim=1))
        marginal = self.critic(torch.cat((x, other), dim=1))
        bound: Tensor = joint.mean() - torch.logsumexp(marginal.squeeze(1), 0)
        return bound + math.log(len(x))


class MutualInformationLoss(nn.Module):
    """weight * (I_zy - beta I_xz), with the permutations drawn from torch's default generator.

    image_features, features, vocabulary   widths of x, z and y
    weight   fixed ("paper"); None with variant="release", where it is trained from 0
    beta     of I(X; Z)
    """

    def __init__(
        self,
        image_features: int,
        features: int,
        vocabulary: int,
        *,
        hidden: int = 32,
        critic_hidden: int = 64,
        weight: float | None = None,
        beta: float = 0.1,
        variant: str = "paper",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_choice("variant", variant, ("paper", "release"))
        sizes = {"image_features": image_features, "features": features, "vocabulary": vocabulary}
        for name, size in (sizes | {"hidden": hidden, "critic_hidden": critic_hidden}).items():
            check_size(name, size)
        check_storage(device, None)
        if weight is not None:
            weight = checks.check_number("weight", weight)
        if variant == "release" and weight is not None:
            raise ValueError(f"weight: want None with variant='release', got {weight}")
        self.image_features, self.features = image_features, features
        self.variant, self.beta = variant, checks.check_number("beta", beta)
        self.club = ClubBound(features, vocabulary, hidden, device=device)
        self.mine = MineBound(image_features, features, critic_hidden, device=device)
        if variant == "release":
            self.weight: Tensor | float = nn.Parameter(torch.zeros(1, device=device))
        else:
            self.weight = 0.01 if weight is None else weight

    def forward(self, image: Tensor, queries: Tensor, labels: Tensor) -> Tensor:
        """The term to add to the loss, a scalar in fp32.

        image    [B, N, image_features], the image tokens
        queries  [B, Q, features], the query outputs
        labels   [B, T], the answer's tokens, -100 where a position is ignored
        """
        check_rows("image", image, self.image_features, lead=("B", "N"))
        self._check(queries, labels)
        if not image.shape[1]:
            raise ValueError(f"image: want N >= 1 tokens, got {list(image.shape)}")
        if len(image) != len(queries) or image.is_meta != queries.is_meta:
            got = f"{len(image)} on {image.device}"
            raise ValueError(
                f"image: want {len(queries)} samples on {queries.device} like queries, got {got}"
            )
        with autocast_off(queries):
            x, z = image.float().mean(1), queries.float().mean(1)
            answers = self._answers(labels)
            batch, device = len(z), z.device
            other = answers.permuted(torch.randperm(batch, device=device))
            drawn = torch.randint(batch, (batch,), device=device)
            objective = self.club.tokens(z, answers, other)
            objective = objective - self.beta * self.mine(x, z, z[drawn])
            weighted: Tensor = self.weight * objective
            return weighted.sum()

    def likelihood(self, queries: Tensor, labels: Tensor) -> Tensor:
        """-log q(y | z), to be added to the loss; it trains the CLUB network alone."""
        self._check(queries, labels)
        with autocast_off(queries):
            y = self._answers(labels).dense(self.club.outputs)
            return self.club.likelihood(queries.float().mean(1), y)

    def _check(self, queries: Tensor, labels: Tensor) -> None:
        check_rows("queries", queries, self.features, lead=("B", "Q"))
        if not queries.shape[1]:
            raise ValueError(f"queries: want Q >= 1 outputs, got {list(queries.shape)}")
        checks.check_tensor("labels", labels)
        checks.check_dtype("labels", labels, (torch.int64, torch.int32))
        checks.check_shape("labels", labels, (len(queries), "T"))
        if labels.is_meta != queries.is_meta:
            raise ValueError(f"labels: want device {queries.device}, got {labels.device}")
        kept = labels.masked_fill(labels == IGNORED, 0)
        check_range("labels", kept, 0, self.club.outputs - 1)

    def _answers(self, labels: Tensor) -> Answers:
        return Answers.of(labels, count_ignored=self.variant == "release")


def _perceptron(
    width: int, hidden: int, outputs: int, device: torch.device | str | None
) -> nn.Sequential:
    layers = [nn.Linear(width, hidden, device=device), nn.Linear(hidden, outputs, device=device)]
    for layer in layers:
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def _rows(perceptron: nn.Sequential, z: Tensor, ids: Tensor) -> Tensor:
    """perceptron(z) at the outputs `ids` [B, P], without the others."""
    last = perceptron[2]
    assert isinstance(last, nn.Linear)
    middle = perceptron[1](perceptron[0](z))
    weight = F.embedding(ids, last.weight)
    out: Tensor = (weight @ middle.unsqueeze(-1)).squeeze(-1) + last.bias[ids]
    return out
