"""Bases of PEFT's layers that fuse() may not read: they are called and their update is fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import petal_kernels as pk
from tests.hf import fused


def _inner(model: Any) -> Any:
    return model.base_model.model


def _trained(model: Any) -> None:
    _inner(model).a.base_layer.weight.requires_grad_(True)


def _hooked(model: Any) -> None:
    _inner(model).a.base_layer.register_forward_hook(lambda module, args, y: y * 2)


def _pre_hooked(model: Any) -> None:
    _inner(model).a.base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _replaced(model: Any) -> None:
    base = _inner(model).a.base_layer
    own = base.forward
    base.forward = lambda x: own(x) + 1


def _subclass(model: Any) -> None:
    _inner(model).a.base_layer.__class__ = fused.Scaled


def _parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(_inner(model).a.base_layer)


def _wrapped(model: Any) -> None:
    """Called like a linear: weights that are no parameter."""
    base = _inner(model).a.base_layer
    weight = base.weight.detach()
    del base.weight
    base.register_buffer("weight", weight * 2)


def _of_another_class(model: Any) -> None:
    class Quantised(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) * 2

    _inner(model).a.base_layer = Quantised(_inner(model).a.base_layer)


CALLED = [
    *(_trained, _hooked, _pre_hooked, _replaced, _subclass, _parametrized, _wrapped),
    _of_another_class,
]


@pytest.mark.parametrize("bias", [False, True], ids=["", "lora_bias"])
@pytest.mark.parametrize("change", CALLED)
def test_a_base_that_may_not_be_read_is_called(change: Callable[[Any], None], bias: bool) -> None:
    plain, x = fused.block(lora_bias=bias), fused.rows()
    model = copy.deepcopy(plain)
    pk.fuse(model)
    for each in (plain, model):
        change(each)
    want = fused.run(plain, x)
    with fused.operators() as calls:
        fused.same(fused.run(model, x), want)
    assert fused.forwards(calls) == {"lowrank_linear": 3}
    report = pk.fuse(model)
    assert list(report.declined) == ["base_model.model.a"]
    row = next(row for row in report.rows if row.module.endswith(".a"))
    assert row.backend != "peft"


def test_what_a_called_base_gives_is_not_written_to() -> None:
    """A linear that keeps and returns one buffer, as in-place kernels do."""
    model, x = fused.block(), fused.rows()
    given = torch.randn(3, 7, 5, dtype=torch.float64)
    before = given.clone()
    pk.fuse(model)
    _inner(model).a.base_layer.forward = lambda x: given
    fused.run(model, x)
    assert torch.equal(given, before)


def test_a_base_that_gives_another_dtype() -> None:
    plain, x = fused.block(torch.float32), fused.rows(torch.float32)
    base = _inner(plain).a.base_layer
    _inner(plain).a.base_layer = nn.Sequential(base)
    _inner(plain).a.base_layer.forward = lambda x: base(x).bfloat16()
    plain = _inner(plain).a
    model = copy.deepcopy(plain)
    model.base_layer.forward = plain.base_layer.forward
    pk.fuse(model)
    want, got = fused.run(plain, x), fused.run(model, x)
    assert got["y"].dtype == torch.bfloat16
    for name, value in want.items():
        assert fused.relative(got[name], value) < 1e-2, name
