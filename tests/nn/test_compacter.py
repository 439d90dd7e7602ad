"""Sums of Kronecker products and the adapter made of them, against torch.kron."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petal_kernels.nn import CompacterAdapter, PHMRule
from petal_kernels.nn.kronecker import PHMWeight
from petal_kernels.nn.published import published_adapter, published_kronecker

B, L, D, R = 3, 11, 24, 8
FORMS: dict[str, dict[str, Any]] = {
    "whole": {"division": 2},
    "factorised": {"division": 4, "factor_r": 1},
    "rank-3": {"division": 2, "factor_r": 3},
    "one": {"division": 1},
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def filled(module: Any, seed: int = 5) -> Any:
    """Every parameter drawn, in fp64."""
    module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def rows(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@EVERY_FORM
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("count", [None, 3])
def test_a_formed_matrix_is_the_sum_of_kronecker_products(
    form: dict[str, Any], shared: bool, count: int | None
) -> None:
    rule = filled(PHMRule(form["division"])) if shared else None
    m = filled(PHMWeight(R, D, **form, rule=rule, count=count), 6)
    assert m().shape == ((R, D) if count is None else (count, R, D))
    torch.testing.assert_close(m(), published_kronecker(m))
    wanted = [m.rules(), *m.factors()]
    dout = rows(*m().shape)
    for a, b in zip(
        torch.autograd.grad(m(), wanted, dout),
        torch.autograd.grad(published_kronecker(m), wanted, dout),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@EVERY_FORM
def test_gradcheck_of_the_forming(form: dict[str, Any]) -> None:
    m = filled(PHMWeight(4, 8, **form))
    names = [name for name, _ in m.named_parameters()]

    def formed(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        whole: Tensor = torch.func.functional_call(m, given, ())
        return whole

    values = tuple(p.detach().requires_grad_() for p in m.parameters())
    assert torch.autograd.gradcheck(formed, values)


@EVERY_FORM
@pytest.mark.parametrize("gate", ["none", "large", "small"])
def test_the_adapter_is_the_published_form(form: dict[str, Any], gate: str) -> None:
    """To 1e-5 of its norm in fp32, each gradient too."""
    rule = PHMRule(form["division"])
    m = CompacterAdapter(D, R, **form, rule=rule, gate=gate, scale=0.6)
    for module in (rule, m):
        filled(module).float()
    h, x = (rows(B, L, D, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
    results = []
    for run in (m, lambda h, x: published_adapter(m, h, x)):
        inputs = [h, *m.parameters(), *rule.parameters()]
        inputs += [] if gate == "none" else [x]
        out = run(h, None if gate == "none" else x)
        dout = rows(B, L, D, seed=3, dtype=torch.float32)
        results.append((out, *torch.autograd.grad(out, inputs, dout)))
    for got, want in zip(*results, strict=True):
        assert float((got - want).detach().norm()) <= 1e-5 * float(want.detach().norm())


def test_a_shared_rule_gathers_every_readers_gradient() -> None:
    """Kind: a rule that each adapter holds for itself."""
    rule = PHMRule(2)
    both: Any = nn.ModuleList([CompacterAdapter(D, R, rule=rule) for _ in range(2)])
    assert not any("rule" in name for name in both.state_dict())
    h = torch.randn(B, L, D)
    grads = [torch.autograd.grad(m(h).square().sum(), rule.weight)[0] for m in both]
    sum(m(h).square().sum() for m in both).backward()
    torch.testing.assert_close(rule.weight.grad, grads[0] + grads[1])
    holder = nn.ModuleDict({"rule": rule, "both": both})
    twin: Any = copy.deepcopy(holder)
    with torch.no_grad():
        twin["rule"].weight.zero_()
    assert not twin["both"][0].projections()[0].any()
    assert both[0].projections()[0].any()


def test_initialisations() -> None:
    torch.manual_seed(0)
    m = CompacterAdapter(768, 96, division=2)
    assert sum(p.numel() for p in m.parameters()) == 2 * (8 + 768 * 96 // 2) + 96 + 768
    bound = math.sqrt(12 / (48 + 384))
    for weight in (m.phm_down, m.phm_up):
        assert weight.factor is not None
        assert 0.99 * bound < float(weight.factor.detach().abs().max()) <= bound
        assert 0.0 < float(weight.rules().detach().abs().max()) < 0.05
    assert not m.down_bias.any()
    h = torch.randn(B, L, D)
    for form in FORMS.values():
        assert torch.equal(CompacterAdapter(D, R, **form, init="zero")(h), h)
        gated = CompacterAdapter(D, R, **form, gate="large", scale=2.0, init="identity")
        torch.testing.assert_close(gated(h, h), h)
        zero = CompacterAdapter(D, R, **form, init="zero")
        zero(h).sum().backward()
        factors = zero.phm_up.factors()
        assert any(f.grad is not None and bool(f.grad.any()) for f in factors), "nothing can move"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_matrices_are_formed_in_fp32(autocast: bool, kept: torch.dtype) -> None:
    """Kind: a sum of products that autocast, or the parameters' 16 bits, round on the way."""
    m = CompacterAdapter(D, R, division=4, factor_r=2, dtype=kept)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        down, up = m.projections()
    for got, weight in ((down, m.phm_down), (up, m.phm_up)):
        assert got.dtype == torch.float32
        want = published_kronecker(copy.deepcopy(weight).double())
        torch.testing.assert_close(got.double(), want)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        m(torch.randn(B, L, D)).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == kept for p in m.parameters())


def test_bad_input() -> None:
    rule = PHMRule(2)
    for make, message in (
        (lambda: CompacterAdapter(D, R, division=5), "features: want a multiple of division=5"),
        (lambda: CompacterAdapter(D, 7), "r: want a multiple of division=2, got 7"),
        (lambda: CompacterAdapter(D, R, division=0), "division: want an integer >= 1, got 0"),
        (lambda: CompacterAdapter(D, R, factor_r=0), "factor_r: want an integer >= 1, got 0"),
        (lambda: CompacterAdapter(D, R, rule=PHMRule(4)), "rule: want division=2, count=None"),
        (lambda: CompacterAdapter(D, R, rule=PHMRule(2, count=3)), "count=None, got division=2"),
        (lambda: PHMWeight(R, D, 2, count=0), "count: want an integer >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="rule: want None or a PHMRule, got a Parameter"):
        CompacterAdapter(D, R, rule=rule.weight)  # type: ignore[arg-type]
