"""Bases of a DoRALinear that lend their weight for its norms, and bases that cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petal_kernels.nn import DoRALinear
from tests.nn.test_dora import built, formula
from tests.nn.test_lora import BASES, D, Doubling, O, P, R, gradients, rows


def _hooked(scale: float = 1.0, wide: bool = False) -> nn.Module:
    base = nn.Linear(D, O)
    base.register_forward_hook(lambda m, args, y: scale * (y.double() if wide else y))
    return base


class Packed(nn.Parameter):
    """A weight of integers, as packages for quantised models have them."""

    def dequantize(self) -> Tensor:
        return self.data.float() / 50


class Quantised(nn.Linear):
    """A linear over it."""

    def __init__(self) -> None:
        super().__init__(D, O)
        packed = (self.weight.detach() * 200).round().to(torch.int8)
        self.weight = Packed(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.dequantize(), self.bias)


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("init", [False, "olora"])
@pytest.mark.parametrize(
    "kind",
    [lambda: Doubling(D, O), lambda: _hooked(2.0), lambda: _hooked(1.0, True), Quantised],
    ids=["another class", "hooked", "wide", "quantised"],
)
def test_a_base_that_is_called_lends_its_weight(
    kind: Callable[[], nn.Module], init: Any, dropout: float
) -> None:
    """PEFT's own words: its output y stands for the base's part, but for what dropout changes."""
    torch.manual_seed(0)
    base: Any = kind()
    base.requires_grad_(False)
    lora, x = DoRALinear(base, R, alpha=3.0, init=init).train(), rows(torch.float32)
    lora.dropout = dropout
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    assert isinstance(lora.operands(x.dtype, x.device), str)
    weight = base.weight.dequantize() if isinstance(base, Quantised) else base.weight
    first = torch.zeros_like(weight)
    if init:
        first = lora.scale * lora.first_up @ lora.first_down  # type: ignore[operator]
    whole = weight - first + lora.scale * lora.up @ lora.down
    gain = lora.magnitude / whole.detach().norm(dim=1)
    torch.manual_seed(4)
    got = lora(x)
    torch.manual_seed(4)
    inner = F.dropout(x, dropout, True)
    y = base(x) - F.linear(x, first)
    plain = F.linear(inner, weight - first) if dropout else y - base.bias
    update = F.linear(inner, lora.scale * lora.up @ lora.down)
    want = y + (gain - 1) * plain + gain * update
    assert got.dtype == base(x).dtype
    close: Any = {"rtol": 5e-5, "atol": 5e-5}
    torch.testing.assert_close(got.float(), want.float(), **close)
    leaves = (x, lora.down, lora.up, lora.magnitude)
    pairs = zip(gradients(got, *leaves), gradients(want.to(got.dtype), *leaves), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("dropout", [0.0, P])
def test_a_trained_base_gets_its_gradient(dropout: float) -> None:
    lora, x = built(dropout=dropout).train(), rows()
    weight: Any = lora.base.weight
    weight.requires_grad_(True)
    leaves = (weight, lora.down, x)
    torch.manual_seed(4)
    got = gradients(lora(x), *leaves)
    torch.manual_seed(4)
    torch.testing.assert_close(got, gradients(formula(lora, x), *leaves))


def _integers() -> nn.Module:
    base = nn.Linear(D, O)
    base.weight = nn.Parameter(torch.ones(O, D, dtype=torch.int8), requires_grad=False)
    return base


class Codes(nn.Parameter):
    """Integers whose class does not say what they mean; torch's own method would guess."""


def _codes() -> nn.Module:
    base = nn.Linear(D, O)
    base.weight = Codes(torch.ones(O, D, dtype=torch.int8), requires_grad=False)
    return base


def _parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(D, O))


def _stranger() -> nn.Module:
    base = nn.Bilinear(1, 1, 1)
    base.in_features, base.out_features = D, O  # type: ignore[assignment]
    return base


def _partitioned() -> nn.Module:
    base = nn.Linear(D, O)
    base.weight.ds_id = 1  # type: ignore[attr-defined]
    return base


REFUSED = [
    (_integers, r"base weight is int8 of shape \[28, 20\]"),
    (_codes, r"base weight is a Codes, which has no dequantize\(\)"),
    (_parametrised, "base is a ParametrizedLinear without a weight of its own"),
    (_stranger, "base is a Bilinear, whose weight may lie in any order"),
    (_partitioned, "base weight is partitioned by DeepSpeed"),
    (lambda: nn.Linear(D, O, device="meta"), "base weight has no values"),
]


@pytest.mark.parametrize(("kind", "why"), REFUSED, ids=[why[:30] for _, why in REFUSED])
def test_a_base_without_norms_is_refused(kind: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(ValueError, match=f"^base: want one whose weight has norms.*: {why}"):
        DoRALinear(kind(), R)


def test_a_weight_that_went_away_is_said_when_it_is_needed() -> None:
    lora = built()
    lora.base.weight.ds_id = 1  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"^DoRA needs the norms .*: base weight is partitioned"):
        lora(rows())


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("init", [False, "pissa"])
def test_delta_is_what_the_weight_gains(kind: str, init: Any) -> None:
    lora, x = built(kind, init=init), rows()
    want = lora(x) - lora.base(x)
    torch.testing.assert_close(F.linear(x, lora.delta(torch.float64)), want)
